from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before datasets and the Hub's client are imported: tests keep their caches to themselves and never look outside.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # of fixtures that several tests share; each test has its own
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import datasets
import pytest
import torch

from tests import tiny


@pytest.fixture(autouse=True, scope="session")
def _no_cache_left() -> Iterator[None]:
    cache = os.environ["HF_DATASETS_CACHE"]
    yield
    shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # for processes that a test starts


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where reference log-probs are kept by default


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # tests run in two processes on two cores


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer; not to be changed."""
    return tiny.make_model_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """24 distinct text pairs in a JSONL file."""
    return tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(24))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system of its own; calling it makes it, or changes its size."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        options = f"size={size}" if not folder.exists() else f"remount,size={size}"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True, check=False)
