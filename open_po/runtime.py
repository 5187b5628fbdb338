"""The process: device, ranks, seeds, console. The only place that sets process-wide state."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import datasets
import huggingface_hub
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from rich.console import Console

from open_po.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What the parts of a run share: the accelerator, this process's place among the ranks, and the console."""

    accelerator: Accelerator
    console: Console

    @staticmethod
    def start(seed: int) -> Runtime:
        """Join the other ranks, if any, seed every generator and quieten the libraries."""
        _quieten_libraries()
        if not torch.cuda.is_available():
            _keep_freed_memory()
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",  # the model casts by itself, alike in training, evaluation and the reference pass
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # rank 0 may tokenise for hours
            ],
        )
        set_seed(seed)
        # A scheduler's SIGTERM ends a run like Ctrl-C: with a line, and a summary that says so.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        console = Console(
            quiet=not accelerator.is_main_process, highlight=False, width=None if sys.stdout.isatty() else 200
        )
        return Runtime(accelerator=accelerator, console=console)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.accelerator.device)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def say(self, line: str) -> None:
        """One line on the main rank's console, never wrapped."""
        self.console.print(line, soft_wrap=True, markup=False)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 only; every rank gets its result or raises its error."""
        if self.world_size == 1:
            return action()
        box: list[T | Exception | None] = [None]
        if self.is_main:
            try:
                box[0] = action()
            except (UserError, OSError) as error:
                box[0] = error
        broadcast_object_list(box)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]  # type: ignore[return-value]

    def on_all(self, action: Callable[[], object]) -> None:
        """Run `action` on every rank; an error on one is raised on all, so that none waits for another forever."""
        if self.world_size == 1:
            action()
            return
        mine: list[Exception | None] = [None]
        try:
            action()
        except (UserError, OSError) as error:
            mine[0] = error
        for failure in gather_object(mine):
            if failure is not None:
                raise failure

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in the ranks' order."""
        return [mine] if self.world_size == 1 else cast(list[T], gather_object([mine]))

    def close(self) -> None:
        """Leave the process group."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _quieten_libraries() -> None:
    # Tokenisation forks one process per CPU, which is parallel enough.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(transformers|torch|accelerate|datasets|peft)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty() or int(os.environ.get("RANK", "0")) > 0:
        datasets.disable_progress_bars()


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed tiles instead of returning each to the kernel (docs/decisions.md has the figures)."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 256 * 2**20)
    except (OSError, AttributeError):
        pass  # not glibc: nothing to tune
