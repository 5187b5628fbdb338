"""The files by which processes that fill one store at once claim responses, without locks; see `fill.py` for who does.

A claim lists the responses that a process is about to compute and store. Others leave these alone while the claim
lasts. It ends when its file is removed, when its process is seen to be dead (on the same machine), or when it is older
than it said it would be. Claims only save work: if two processes overlook each other's, a response is computed twice.
"""

from __future__ import annotations

import os
import platform
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from open_po.data.tokenization import KEY_DTYPE
from open_po.output.files import write_atomically
from open_po.reference.shards import Keys


class Claims:
    """This process's claim on a store, and those of others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / f"claim-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.safetensors"

    def take(self, keys: Keys, seconds: float) -> None:
        """Claim `keys`, in place of what was claimed before, for at most `seconds`. Raises OSError."""
        tensors = {"keys": keys.view(np.uint8).reshape(-1, KEY_DTYPE.itemsize)}
        claimant = {"host": platform.node(), "pid": str(os.getpid()), "seconds": str(seconds)}
        content = save(tensors, claimant)
        write_atomically(self.path, lambda temporary: temporary.write_bytes(content))

    def release(self) -> None:
        """Claim nothing any more."""
        self.path.unlink(missing_ok=True)

    def others(self) -> list[Keys]:
        """What each other process claims at the moment. Claims that have ended are removed. Raises OSError."""
        paths = [path for path in self.folder.glob("claim-*.safetensors") if path != self.path]
        now = self._now() if paths else 0.0
        found = []
        for path in paths:
            try:
                age = now - path.stat().st_mtime
                with safe_open(path, framework="np") as file:
                    keys, claimant = file.get_tensor("keys"), file.metadata()
            except (OSError, SafetensorError):  # released meanwhile, or not visible as a whole yet
                continue
            if age > float(claimant["seconds"]) or _is_dead(claimant["host"], int(claimant["pid"])):
                with suppress(OSError):  # another user's, in a folder where each may only remove files of their own
                    path.unlink()
            else:
                found.append(np.ascontiguousarray(keys).view(KEY_DTYPE)[:, 0])
        return found

    def _now(self) -> float:
        """The time by the file system's clock, which need not be this machine's."""
        probe = self.path.with_suffix(".now")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now


def _is_dead(host: str, pid: int) -> bool:
    """Whether a process of this machine has ended; of another machine's nothing is known."""
    if host != platform.node():
        return False
    if pid == os.getpid():  # one before this, as where a container was started again
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:  # or another user's, which lives
        return isinstance(error, ProcessLookupError)
    return False
