"""Other processes of this machine that do a part of some work, and end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from open_po.errors import UserError

_LOOK_SECONDS = 0.5
# A fork shares the tokenizer, and all that is imported, with the process that it comes from.
_METHOD = "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def run_workers(do: Callable[..., object], arguments: tuple[Any, ...], count: int, look: Callable[[], object]) -> None:
    """Have `count` processes call `do`, and `look` at times until all are done.

    Raises what one of them raises, or UserError if one was killed; the others are then ended.
    """
    context = multiprocessing.get_context(_METHOD)
    process: Callable[..., BaseProcess] = context.Process  # type: ignore[attr-defined]
    workers, lines = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe(duplex=False)
            worker = process(target=_work, args=(theirs, os.getpid(), do, arguments), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            lines.append(ours)
        waiting = list(lines)
        while waiting:
            for line in wait(waiting, timeout=_LOOK_SECONDS):
                assert isinstance(line, Connection)
                waiting.remove(line)
                _raise_what_came(line)
            look()
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
        for line in lines:
            line.close()


def _raise_what_came(line: Connection) -> None:
    try:
        error = line.recv()
    except EOFError:
        raise UserError(
            "a process that tokenises was killed, perhaps for want of memory; what is done is kept, and the same "
            "command goes on from there (fewer preprocessing_num_workers need less)"
        ) from None
    if error is not None:
        raise error


def _work(line: Connection, parent: int, do: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """In the worker: do it, and say how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent ends the workers
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    error: BaseException | None = None
    try:
        do(*arguments)
    except BaseException as raised:
        error = raised
    line.send(_sendable(error))
    line.close()


def _sendable(error: BaseException | None) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
