"""One file of a reference cache: rows written once, in safetensors, under the hash of the file's own bytes.

`rows-SHA256.safetensors` holds n responses, sorted by key:

    keys         uint8   [n, 16]  `response_key` of prompt and response
    logps        float32 [n]      summed log-prob, nats
    tokens       int32   [n]      scored tokens
    token_logps  float32 [sum of tokens], only where log-probs were asked for by token, one response after the other

and, as text, when, where and with what it was made. The name is the first 32 hexadecimal digits of `sha256sum FILE`.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from open_po.data.tokenization import KEY_DTYPE
from open_po.errors import first_line
from open_po.output.files import write_atomically

Keys = NDArray[np.void]  # of KEY_DTYPE, see `response_key`

_PATTERN = "rows-*.safetensors"
_ASIDE = "damaged-"
_DIGITS = 32
# A file this young that does not fit its name may be one whose content this machine cannot see yet: look again.
_SETTLED_SECONDS = 60.0
_SETTLING_SECONDS = 0.5


class Row(NamedTuple):
    """A response's log-prob."""

    logp: float  # summed, nats
    tokens: int
    token_logps: Sequence[float] | None  # of each token, if they were asked for


class DamagedShard(Exception):
    """A file that does not fit its name, or holds something else than rows; says in what."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An open file of rows; its arrays are mapped from the disk."""

    path: Path
    keys: Keys  # [n]
    logps: NDArray[np.float32]  # [n], nats
    tokens: NDArray[np.int32]  # [n]
    token_logps: NDArray[np.float32] | None  # [sum of tokens]
    made: dict[str, str]  # see `origin`

    def __len__(self) -> int:
        return len(self.keys)

    def describe(self) -> str:
        """When, where and with what it was made."""
        return ", ".join(f"{name} {value}" for name, value in sorted(self.made.items()))

    @property
    def age_key(self) -> tuple[str, str]:
        """What files are sorted by, the oldest first."""
        return self.made.get("created", ""), self.path.name


def shard_files(folder: Path) -> list[Path]:
    """The row files of a folder."""
    return sorted(folder.glob(_PATTERN))


def origin(device: torch.device) -> dict[str, str]:
    """What is recorded of the machine that computes rows; none of it is part of a key."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device.type} ({kind})", "torch": torch.__version__, "host": platform.node()}


def write_shard(folder: Path, rows: dict[bytes, Row], made: dict[str, str]) -> Shard:
    """Store `rows` in a new file. Raises OSError if the disk refuses; then there is no file."""
    keys = sorted(rows)
    ordered = [rows[key] for key in keys]
    arrays: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_DTYPE.itemsize),
        "logps": np.array([row.logp for row in ordered], dtype=np.float32),
        "tokens": np.array([row.tokens for row in ordered], dtype=np.int32),
    }
    by_token = [row.token_logps for row in ordered if row.token_logps is not None]
    if len(by_token) == len(rows):
        arrays["token_logps"] = np.concatenate([np.asarray(part, dtype=np.float32) for part in by_token])
    made = made | {"created": datetime.now(UTC).isoformat(timespec="microseconds")}
    content = save(arrays, made)
    path = folder / f"rows-{hashlib.sha256(content).hexdigest()[:_DIGITS]}.safetensors"
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return _shard(path, arrays, made)


def _shard(path: Path, arrays: dict[str, NDArray[Any]], made: dict[str, str]) -> Shard:
    return Shard(
        path=path,
        keys=arrays["keys"].view(KEY_DTYPE)[:, 0],
        logps=arrays["logps"],
        tokens=arrays["tokens"],
        token_logps=arrays.get("token_logps"),
        made=made,
    )


def read_shard(path: Path) -> Shard:
    """Check a file against its name and open it. Raises DamagedShard, and OSError if it cannot be read."""
    fits = _fits_its_name(path)
    if not fits and time.time() - path.stat().st_mtime < _SETTLED_SECONDS:
        time.sleep(_SETTLING_SECONDS)
        fits = _fits_its_name(path)
    if not fits:
        raise DamagedShard("its content does not fit the hash in its name")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            arrays = {name: file.get_tensor(name).numpy() for name in names}
            made = file.metadata() or {}
    except SafetensorError as error:
        raise DamagedShard(f"is no safetensors file ({first_line(error)})") from error
    try:
        return _shard(path, arrays, made)
    except KeyError as error:
        raise DamagedShard(f"holds no tensor {error}") from error


def set_aside(path: Path) -> bool:
    """Rename a damaged file so that nothing reads it again; False in a folder that may only be read."""
    try:
        path.rename(path.with_name(f"{_ASIDE}{path.name}"))
    except OSError:
        return False
    return True


def damaged_files(folder: Path) -> list[Path]:
    """The files of a folder that were set aside."""
    return sorted(folder.glob(f"{_ASIDE}{_PATTERN}"))


def _fits_its_name(path: Path) -> bool:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.stem == f"rows-{digest[:_DIGITS]}"


def find(sorted_keys: Keys, wanted: Keys) -> NDArray[np.int64]:
    """Where each of `wanted` first stands in `sorted_keys`; -1 where it does not."""
    if not len(sorted_keys):
        return np.full(len(wanted), -1, dtype=np.int64)
    places = np.searchsorted(sorted_keys, wanted)
    places[places == len(sorted_keys)] = 0
    return np.where(sorted_keys[places] == wanted, places, -1)
