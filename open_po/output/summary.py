"""What `run_summary.json` says of a run."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress

from open_po import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "liger-kernel", "peft")


def versions() -> dict[str, str]:
    """Versions of Python, this package and what its numbers depend on."""
    found = {"python": platform.python_version(), "open_po": __version__}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
