"""What this node is about to do, for comparison with the other nodes."""

from __future__ import annotations

import hashlib
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import open_po
from open_po.commands.place import Place
from open_po.config import RunConfig
from open_po.distributed.rendezvous import NodeFacts

ROOT = Path(open_po.__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "liger_kernel", "datasets", "peft")
_DIGEST_LETTERS = 16


def facts_of(place: Place, config: RunConfig, restarts: int) -> NodeFacts:
    """This node's facts."""
    return NodeFacts(
        node=place.node,
        host=socket.gethostname(),
        nodes=place.nodes,
        processes=place.processes,
        restarts=restarts,
        code=code_digests(),
        config=config.flat(),
        versions={"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    )


def code_digests() -> dict[str, str]:
    """Digest by file of everything that a rank may import of the project."""
    files = sorted([ROOT / "dpo_tune_cache.py", *Path(open_po.__file__).resolve().parent.rglob("*.py")])
    return {
        str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGEST_LETTERS] for path in files
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
