"""Requests to the Hub that are made again after an error that may pass."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from open_po.errors import UserError

T = TypeVar("T")
Say = Callable[[str], object]

# Seconds of trying again: before training somebody is looking; in training the next checkpoint may be better off.
AT_START, IN_TRAINING, AT_THE_END = 60.0, 300.0, 600.0
# After which a server is taken for dead: the client itself would wait for it forever.
SILENCE_SECONDS = float(os.environ.get("OPEN_PO_HUB_TIMEOUT", "60"))
_LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
_LONGEST_ASKED = 300.0  # of what a server asks for
_PASSING = (408, 409, 412, 429)  # statuses; the branch may have got another commit since it was looked at (409, 412)
_FINAL = (OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError, FileNotFoundError, PermissionError)


def persistently(what: str, action: Callable[[], T], *, patience: float, say: Say) -> T:
    """Do `action`, again while it fails in a way that may pass, for `patience` seconds.

    `action` must be one that may be done twice. Every failure is told in a line. Raises UserError that names `what`.
    """
    failures, gives_up = 0, 0.0
    while True:
        began = time.monotonic()
        get_session().timeout = SILENCE_SECONDS  # each time: the client may have made itself a new session
        try:
            return action()
        except Exception as raised:  # the client's own errors, or those of the HTTP library it is built on
            error = _cause(raised)
            if not may_pass(error):
                raise UserError(f"{what} failed ({reason(error)})") from error
            failures += 1
            if not gives_up or time.monotonic() - began > patience:  # an attempt that long had come a good way
                gives_up = time.monotonic() + patience
            wait = _wait_after(error, failures)
            if time.monotonic() + wait > gives_up:
                raise UserError(f"{what} failed, the last of {failures} times with: {reason(error)}") from error
            say(f"{what} failed ({reason(error)}); trying again in {wait:.0f} s")
            time.sleep(wait)


def may_pass(error: Exception) -> bool:
    """Whether trying again may help: the server was busy or broken, or did not answer at all."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status in _PASSING
    return not isinstance(error, _FINAL)


def _cause(error: Exception) -> Exception:
    """What the server answered, where the client has wrapped it into an error of its own."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, HfHubHTTPError):
            return found
        found = found.__cause__
    return error


def reason(error: Exception) -> str:
    """What an error says, in one line, addresses without the keys in them."""
    said = re.sub(r"(https?://[^\s?]+)\?[^\s'\"]+", r"\1", " ".join(str(error).split()))
    return said or type(error).__name__


def _wait_after(error: Exception, failures: int) -> float:
    """Seconds until the next attempt: twice as long each time, a little random, or what the server asks for."""
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "")
        if asked.isdigit():
            return min(_LONGEST_ASKED, float(asked))
    return float(min(_LONGEST_WAIT, 2 ** (failures - 1))) * random.uniform(0.75, 1.25)
