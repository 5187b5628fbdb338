"""Which files a model is, wherever it comes from, and their hashes: what it is known by."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from open_po.config import RunConfig
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError, first_line
from open_po.output.files import write_atomically

_SAFE = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_OTHER = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_NO_WEIGHTS = "holds no weights, neither model.safetensors nor pytorch_model.bin nor adapter_model.safetensors"
_MEMO = "file_hashes.json"
# A file that was changed less than this before it was read might change again without a new time stamp.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from, as the user says it."""

    name: str  # a folder, or a Hub model
    revision: str | None = None
    trust_remote_code: bool = False

    def refuse_missing(self, field: str) -> None:
        """Raises UserError if the name is a path to no folder, or a folder is asked for a revision."""
        if self.revision is not None and Path(self.name).is_dir():
            raise UserError(
                f"{field}: {self.name} is a folder, which has no revision {self.revision}; revisions are of Hub models"
            )
        looks_local = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1
        if looks_local and not Path(self.name).is_dir():
            raise UserError(f"{field}: {self.name} is no folder")

    def folder(self) -> Path:
        """The folder with the model's files; a Hub model's are downloaded if they are not yet here.

        Raises UserError if it cannot be reached or holds no weights.
        """
        return Path(self.name) if Path(self.name).is_dir() else _downloaded(self.name, self.revision)

    def description(self) -> Path:
        """The folder, or one with what describes the model and no weights. Raises UserError if it cannot be reached."""
        return Path(self.name) if Path(self.name).is_dir() else _described(self.name, self.revision)

    def config_folder(self) -> Path:
        """A folder with the model's config.json, and its code; of the base model, if its files are adapters.

        Raises UserError if it cannot be reached.
        """
        folder = self.description()
        base = adapter_base(folder, self.trust_remote_code)
        if base is not None:
            return base.config_folder()
        if not (folder / "config.json").is_file():
            raise UserError(f"{self.name}: has no config.json")
        return folder


@functools.cache
def _described(name: str, revision: str | None) -> Path:
    """The snapshot folder of a Hub model, with what describes it and no weights."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", _ADAPTER[0], "*.py"]))
    except Exception as error:  # the client's own errors, or those of the HTTP library it is built on
        raise UserError(
            f"{name}: neither a local folder nor a Hub model that can be reached ({first_line(error)})"
        ) from error


@functools.cache  # a branch may move, but not during a run
def _downloaded(name: str, revision: str | None) -> Path:
    """The snapshot folder of a Hub model, with its card and the files that transformers would load, no others."""
    try:
        for weights in ((*_ADAPTER, *_SAFE), _OTHER):
            # A Hub pattern's * also matches `/`: these take neither sub-folders nor variants such as
            # model.fp16.safetensors.
            patterns = ["config.json", "generation_config.json", "README.md", "*.py", *weights]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
            found = _weights(folder, weights)
            if not all(path.exists() for path in found):  # an index names other files than usual
                patterns += [path.name for path in found]
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
            if found:
                return folder
    except UserError:
        raise
    except Exception as error:  # the client's own errors, or those of the HTTP library it is built on
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: neither a local folder nor a Hub model that can be reached ({reason})") from error
    raise UserError(f"{name}: the Hub repository {_NO_WEIGHTS}")


def adapter_base(folder: Path, trust_remote_code: bool) -> ModelSource | None:
    """The model that the adapters in `folder` are for; None if it holds none. Raises UserError for a damaged file."""
    path = folder / _ADAPTER[0]
    if not path.is_file():
        return None
    try:
        content = adapter_settings(folder)
        name, revision = content["base_model_name_or_path"], content.get("revision")
        if not name or Path(name).resolve() == folder.resolve():
            raise ValueError(f"it is {name!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: names no base model ({error}); set its base_model_name_or_path") from error
    return ModelSource(name=name, revision=revision, trust_remote_code=trust_remote_code)


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What peft is told of the adapters in a folder that holds some. Raises OSError, ValueError."""
    content: dict[str, Any] = json.loads((folder / _ADAPTER[0]).read_text())
    return content


class FileHashes:
    """SHA-256 of files, remembered in `folder`, if it exists, for as long as their size, times and inode stay."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _MEMO
        self._known = self._read()
        self._fresh = False

    def _read(self) -> dict[str, list[Any]]:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def of(self, path: Path) -> str:
        """The hash of a file's content. Raises OSError."""
        name, status = str(path.resolve()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
        known = self._known.get(name)
        if isinstance(known, list) and known[:-1] == stamp:
            return str(known[-1])
        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if settled:
            self._known[name] = [*stamp, digest]
            self._fresh = True
        return digest

    def save(self) -> None:
        """Keep what is new for the next process. What cannot be kept is hashed again then."""
        if self._fresh and self.path.parent.is_dir():
            content = self._read() | self._known
            with suppress(OSError):
                write_atomically(self.path, lambda path: path.write_text(json.dumps(content, indent=0)))


def model_identity(source: ModelSource, memo: Path) -> dict[str, str]:
    """SHA-256 of a model's configuration, weight files and, if it may run, its own code, by file name.

    The files of a folder of adapters are followed by those of its base model, as `base/NAME`. `memo` is the folder in
    which hashes are remembered, if it exists. Raises UserError if there are no weights, or they cannot be reached.
    """
    folder, hashes = source.folder(), FileHashes(memo)
    try:
        identity = {path.name: hashes.of(path) for path in _files(folder, source)}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    hashes.save()
    base = adapter_base(folder, source.trust_remote_code)
    if base is not None:
        identity |= {f"base/{name}": digest for name, digest in model_identity(base, memo).items()}
    return identity


def agreed_identity(source: ModelSource, memo: Path, runtime: Runtime) -> dict[str, str]:
    """`model_identity`, made sure of on all ranks, whose machines may have files of their own under one name.

    Raises UserError naming a rank whose files differ from rank 0's.
    """
    # Rank 0 alone at first: the others find hashes remembered.
    identities = runtime.gather(runtime.main_first(model_identity, source, memo))
    for rank, other in enumerate(identities):
        differing = sorted(name for name, _ in identities[0].items() ^ other.items())
        if differing:
            raise UserError(
                f"{source.name}: rank {rank} has another {differing[0]} than rank 0; give all machines the same files",
                shared=True,
            )
    return identities[0]


def _files(folder: Path, source: ModelSource) -> list[Path]:
    """The files that decide what a model computes: transformers prefers safetensors, and adapters to whole weights."""
    if (folder / _ADAPTER[0]).is_file():
        return [folder / name for name in _ADAPTER if (folder / name).is_file()]
    for patterns in (_SAFE, _OTHER):
        if weights := _weights(folder, patterns):
            code = folder.glob("*.py") if source.trust_remote_code else ()
            return sorted({*weights, *folder.glob("config.json"), *code})
    raise UserError(f"{source.name}: {_NO_WEIGHTS}")


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers takes a folder's weights from; none if it takes others."""
    whole, index = folder / _SAFE[0], folder / _SAFE[2]
    if whole.is_file():
        return [whole]
    return sorted(_weights(folder, [index.name]) - {index}) if index.is_file() else []


def _weights(folder: Path, patterns: Sequence[str]) -> set[Path]:
    """The files of some patterns, and those that an index among them names. Raises UserError for a damaged index."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    for index in [path for path in found if path.name.endswith(".index.json")]:
        try:
            found |= {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: names no weight files ({error}); copy or download the model again") from error
    return found


def policy_source(config: RunConfig) -> ModelSource:
    """Where the policy's starting weights come from."""
    model = config.model
    return ModelSource(
        name=model.model_name_or_path, revision=model.model_revision, trust_remote_code=model.trust_remote_code
    )


def reference_source(config: RunConfig) -> ModelSource | None:
    """Where the reference model comes from, if it is another than the policy's starting weights."""
    name, revision = config.reference.reference_model_name_or_path, config.reference.reference_model_revision
    if name is None or (name, revision) == (config.model.model_name_or_path, config.model.model_revision):
        return None
    return ModelSource(name=name, revision=revision, trust_remote_code=config.model.trust_remote_code)
