"""The machine that a benchmark ran on, in a line of its report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def machine(device: str, threads: int, *more_packages: str) -> str:
    """What it ran on, without names of hosts."""
    import torch

    names = ("torch", "transformers", *more_packages)
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    python = f"Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; {python}, {packages}"
    return f"{_cpu_name()}, {os.cpu_count()} cores, {threads} threads; {python}, {packages}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
