"""What W&B's own process has put on disk of a run without a server: files of protobufs, read as far as they go."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_START = 7  # bytes before the first record
_BLOCK, _HEADER = 32768, 7  # of a LevelDB log, which the rest is: a record's header does not go over a block's end
_LAST_PARTS = (1, 4)  # a whole record, and the last part of one


def last_step(folder: Path, run_id: str) -> int:
    """The last step that the files of a run hold, -1 if none does; each start of the run has written its own."""
    return max(
        (step for path in folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb") for step in _steps(path)), default=-1
    )


def _steps(path: Path) -> Iterator[int]:
    from wandb.proto import wandb_internal_pb2 as protocol

    messages: Any = protocol  # made when it is imported
    for content in _records(path.read_bytes()):
        record = messages.Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def _records(content: bytes) -> Iterator[bytes]:
    parts, position = b"", _START
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + _HEADER])
        position += _HEADER
        if position + length > len(content):  # a killed process was writing it
            return
        parts += content[position : position + length]
        position += length
        if kind in _LAST_PARTS:
            yield parts
            parts = b""
