"""Errors a user can cause. They are shown as one line, without a traceback."""

from __future__ import annotations

import re
from collections.abc import Sequence


class UserError(Exception):
    """Something outside the code is wrong: the message names the value, where it stands and the fix.

    `dpo_tune_cache.py` prints it as one line and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared  # raised on every rank alike, so that one of them tells it


class ConfigError(UserError):
    """Every problem found in a configuration, reported together; exits with code 2."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class NotUploadedError(UserError):
    """A run is over and its model is on disk, but not on the Hub. Exits with code 76, EX_PROTOCOL."""

    exit_code = 76


class StrandedError(UserError):
    """Raised on one rank amid what all do together: the others cannot be told, and end when this process does."""


class Preempted(KeyboardInterrupt):
    """A scheduler, or the clock, ended the run early; started again, it goes on. Exits with code 75, EX_TEMPFAIL."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """What another library's error says first, or its kind if it says nothing; what a line announces is told too."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {next(filter(None, map(str.strip, others)), '')}".strip() if first.endswith(":") else first


def user_line(error: BaseException) -> str | None:
    """The one line that tells a user of an error that is not the code's own; None for one that is."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return f"out of memory ({first_line(error)}); lower max_tokens_per_batch, or set gradient_checkpointing"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    if isinstance(error, Preempted):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return (
            "interrupted; what is on disk is kept, and the same command goes on from there (training does with "
            "--resume_from_checkpoint auto)"
        )
    if isinstance(error, RuntimeError) and re.search("closed by peer|reset by peer|Broken pipe", str(error)):
        return "another process of this run has stopped; its own line says why"
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or this machine, had no memory left for a tensor."""
    import torch  # which takes seconds: a mistake that is told before anything runs does without

    said = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)
