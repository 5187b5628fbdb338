"""Errors a user can cause. They are shown as one line, without a traceback."""

from __future__ import annotations

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


def first_line(error: BaseException) -> str:
    """What another library's error says first, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
