"""Which content a file or a folder of data has: its hash, and where what is made of it is kept."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import datasets

from open_po.output.files import write_atomically

# Smaller files are hashed at every start: at 0.5 to 2 GB/s that takes no time. For larger ones the hash is remembered
# with what the system says of the file, if nobody had touched it for a while before it was hashed: then any later
# change has a later time than the one remembered. The change time counts too, which no program can set back.
_ALWAYS_HASHED = 64 * 2**20
_SETTLED_NS = 60 * 10**9  # clocks of machines differ, and some file systems count in seconds


def cache_folder() -> Path:
    """Where what is made of data is kept, by content."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "open_po"


def text_digest(*texts: str) -> str:
    """Name of what is made from `texts`."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def file_facts(path: Path) -> list[int]:
    """What the system says of a file without reading it: equal as long as nobody has changed it."""
    facts = path.stat()
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def file_digest(path: Path) -> str:
    """Hash of a file's content. Raises OSError."""
    facts = file_facts(path)
    *_, size, modified, changed = facts
    if size <= _ALWAYS_HASHED:
        return _hash(path)
    memory = cache_folder() / "digests" / f"{text_digest(str(path.resolve()))}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memory.read_text())
        if known["facts"] == facts:
            return str(known["digest"])
    begun = time.time_ns()
    digest = _hash(path)
    if max(modified, changed) < begun - _SETTLED_NS and file_facts(path) == facts:
        memory.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"facts": facts, "digest": digest})
        write_atomically(memory, lambda temporary: temporary.write_text(content))
    return digest


def folder_digest(folder: Path) -> str:
    """Hash of the content of all files in a folder, and their names. Raises OSError."""
    names = sorted(
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, files in os.walk(folder, followlinks=True)
        for name in files
    )
    return text_digest(*(part for name in names for part in (name, file_digest(folder / name))))


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
