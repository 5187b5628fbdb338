"""Files that are whole or not there, and what to say when a disk refuses."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from open_po.errors import UserError

_LOCK_TRIES, _LOCK_SECONDS = 5, 0.05
_UMASK = os.umask(0o077)  # which can only be read by setting it
os.umask(_UMASK)


def write_atomically(path: Path, write: Callable[[Path], object], *, sync: bool = True) -> None:
    """`write` a file under a temporary name, fsync it and only then give it its own: it is never seen half-written.

    Without `sync` that does not hold for a crash of the machine.
    """
    # Processes of several machines can have the same number.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        write(temporary)
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file, and a temporary name says nothing
        raise
    finally:
        temporary.unlink(missing_ok=True)


def open_to_others(folder: Path) -> None:
    """Give safetensors files the permissions of any other: they come for their owner alone. Raises OSError."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~_UMASK)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; none if there is no file, and lines that a crash has damaged are left out.

    Raises OSError.
    """
    found: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict):
                    found.append(record)
    return found


@contextmanager
def disk_faults(what: str, kept: str) -> Iterator[None]:
    """Raise a UserError for a full or failing disk, whatever type of error a library wraps it in."""
    try:
        yield
    except Exception as error:
        reason = _disk_fault(error)
        if reason is None:
            raise
        raise UserError(f"{what} cannot be written ({reason}); {kept}") from error


def _disk_fault(error: BaseException | None) -> str | None:
    """What the system said about the file, if that is what `error` is about."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if found := re.search(r"([^:]+) \(os error \d+\)", str(error)):  # safetensors, tokenizers
            return found[1].strip()
        if re.search("iostream error|PytorchStreamWriter failed", str(error)):  # torch.save to a path
            return "the disk is full, or refuses"
        error = error.__cause__ or error.__context__  # torch.save
    return None


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Do something while no other process does what it has the same lock file for; waits for it to end."""
    with open(path, "w") as file:
        with suppress(OSError):  # where the file system has no locks, nothing is kept out
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_folder(path: Path, who: str) -> int | None:
    """Keep others out of a folder until this process ends or closes what is returned.

    Raises UserError that `who` is writing there. Where the file system has no locks, nothing is kept out.
    """
    try:
        held = os.open(path, os.O_RDONLY)
        for tries_left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return held
            except BlockingIOError as error:
                if not tries_left:
                    os.close(held)
                    raise UserError(f"{who} is writing to it; choose another folder") from error
            time.sleep(_LOCK_SECONDS)  # somebody may just be looking, see `is_locked`
    except OSError:
        pass
    return None


def is_locked(path: Path) -> bool | None:
    """Whether a process keeps others out of a folder; None if that cannot be known.

    Some file systems show a lock on the machine alone that holds it.
    """
    try:
        looked = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(looked, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(looked)
