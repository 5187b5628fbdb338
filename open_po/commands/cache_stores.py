"""What a cache of reference log-probs holds, and changing that: `python -m open_po cache info|verify|prune|merge`."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from open_po.data.tokenization import KEY_DTYPE
from open_po.errors import UserError
from open_po.output.files import write_atomically
from open_po.output.tables import make_table
from open_po.reference.claims import Claims
from open_po.reference.shards import DamagedShard, Shard, damaged_files, read_shard, set_aside, shard_files
from open_po.reference.store import MANIFEST, ReferenceStore, read_manifest

# ------------------------------------------------------------------------------------------------------ what is there


_SHOWN_DIGITS = 12  # of a key: enough to tell stores apart, and to name one


@dataclass(frozen=True, kw_only=True)
class StoreFiles:
    """A store as it lies on disk."""

    folder: Path
    manifest: dict[str, Any]
    shards: list[Shard]
    faults: dict[Path, str] = field(default_factory=dict)  # files that are damaged
    unreadable: int = 0  # files
    aside: list[Path] = field(default_factory=list)  # files that were set aside before

    @property
    def model(self) -> str:
        """The model's name, as the run said it that made the store."""
        return str(self.manifest.get("about", {}).get("model", "?"))


def _stores(cache: Path) -> list[StoreFiles]:
    """The stores of a cache, every file read and checked.

    Stores of a newer format, and files that cannot be read, are left alone, with a line. Raises UserError if
    the cache is no folder, or one of its stores.
    """
    if not cache.is_dir():
        raise UserError(f"{cache}: is no folder; name a reference_cache_dir")
    if (cache / MANIFEST).is_file():
        raise UserError(f"{cache}: is one store of a cache; name the folder it lies in")
    found = []
    for folder in sorted(path for path in cache.iterdir() if path.is_dir()):
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            print(f"left alone: {error}", file=sys.stderr)
            continue
        if manifest is None and not shard_files(folder):
            continue
        manifest = manifest or {}
        shards, faults, unreadable = [], {}, 0
        for path in shard_files(folder):
            try:
                shards.append(read_shard(path))
            except DamagedShard as damage:
                faults[path] = str(damage)
            except FileNotFoundError:  # removed, or set aside, meanwhile
                continue
            except OSError as error:
                print(f"left alone: {path}: cannot be read ({error.strerror})", file=sys.stderr)
                unreadable += 1
        found.append(
            StoreFiles(
                folder=folder,
                manifest=manifest,
                shards=shards,
                faults=faults,
                unreadable=unreadable,
                aside=damaged_files(folder),
            )
        )
    return found


def info(arguments: argparse.Namespace, console: Console) -> int:
    """A line for each store."""
    table = make_table(f"Reference cache {arguments.dir}", "model", "key", "numerics", header=True)
    for name in ("rows", "tokens", "by token", "files", "MB"):
        table.add_column(name, justify="right")
    for store in _stores(arguments.dir):
        keys = np.concatenate([np.empty(0, KEY_DTYPE), *(shard.keys for shard in store.shards)])
        tokens = np.concatenate([np.empty(0, np.int32), *(shard.tokens for shard in store.shards)])
        distinct, first = np.unique(keys, return_index=True)
        by_token = sum(len(shard) for shard in store.shards if shard.token_logps is not None)
        bad = len(store.faults) + len(store.aside)
        numerics = store.manifest.get("numerics", {})
        table.add_row(
            store.model,
            store.folder.name[:_SHOWN_DIGITS],
            f"{numerics.get('compute_dtype')}, {numerics.get('kernels')}",
            f"{len(distinct):,}",
            f"{int(tokens[first].sum()):,}",
            f"{by_token:,}",
            f"{len(store.shards):,}" + (f" ({bad} damaged)" if bad else ""),
            f"{sum(shard.path.stat().st_size for shard in store.shards) / 1e6:,.1f}",
        )
    console.print(table if table.row_count else f"{arguments.dir}: holds no reference log-probs")
    return 0


def verify(arguments: argparse.Namespace, console: Console) -> int:
    """Read every file; 1 if one is damaged, which is set aside, or cannot be read."""
    damaged = good = unreadable = 0
    for store in _stores(arguments.dir):
        good, unreadable = good + len(store.shards), unreadable + store.unreadable
        for path, fault in store.faults.items():
            kept = set_aside(path)
            what = "is set aside; a run that needs its rows computes them again" if kept else "cannot be set aside"
            console.print(f"{path}: {fault}; {what}", soft_wrap=True, markup=False)
            damaged += 1
    more = f", {unreadable} cannot be read" if unreadable else ""
    console.print(f"{good} files are whole, {damaged} damaged{more}", markup=False)
    return int(damaged + unreadable > 0)


# ------------------------------------------------------------------------------------------------------- changing it


def prune(arguments: argparse.Namespace, console: Console) -> int:
    """Remove whole stores, files by age, or files that were set aside."""
    if not (arguments.key or arguments.model or arguments.older_than is not None or arguments.damaged):
        raise UserError("prune: says not what to remove; give --key, --model, --older-than or --damaged")
    stores = _stores(arguments.dir)
    for key in arguments.key:
        if sum(store.folder.name.startswith(key) for store in stores) != 1:
            raise UserError(
                f"--key {key}: is the beginning of no store's name in {arguments.dir}, or of several; see info"
            )
    if arguments.model and not any(arguments.model in store.model for store in stores):
        raise UserError(f"--model {arguments.model}: no store in {arguments.dir} is of such a model; see info")
    limit = None if arguments.older_than is None else time.time() - 86_400 * arguments.older_than
    freed = 0
    for store in stores:
        named = store.folder.name.startswith(tuple(arguments.key)) or bool(
            arguments.model and arguments.model in store.model
        )
        if (arguments.key or arguments.model) and not named:
            continue
        bad = {*store.faults, *store.aside}
        files = [*shard_files(store.folder), *store.aside]
        doomed = [
            path
            for path in files
            if (limit is None or path.lstat().st_mtime < limit) and (path in bad or not arguments.damaged)
        ]
        everything = len(doomed) == len(files) and limit is None and not arguments.damaged
        if not doomed and not everything:
            continue
        if Claims(store.folder).others():
            raise UserError(f"{store.folder}: a process is filling this store; prune it afterwards")
        size = sum(path.lstat().st_size for path in doomed)
        freed += size
        said = f"{store.folder} ({store.model}): {len(doomed)} of {len(files)} files"
        console.print(f"{said}, {size / 1e6:,.1f} MB", soft_wrap=True, markup=False)
        if arguments.dry_run:
            continue
        for path in doomed:
            path.unlink(missing_ok=True)
        if len(doomed) == len(files):
            shutil.rmtree(store.folder)
    console.print(f"{'Would free' if arguments.dry_run else 'Freed'} {freed / 1e6:,.1f} MB", markup=False)
    return 0


def merge(arguments: argparse.Namespace, console: Console) -> int:
    """Copy into one cache the files of others that hold rows it lacks."""
    copied = rows = 0
    if arguments.into.resolve() in [source.resolve() for source in arguments.folders]:
        raise UserError(f"--into {arguments.into}: is one of the caches to take rows from; name another")
    for source in arguments.folders:
        stores = _stores(source)
        if not stores:
            raise UserError(f"{source}: holds no reference log-probs")
        for store in stores:
            target = arguments.into / store.folder.name
            try:
                target.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--into {arguments.into}: no folder can be made there ({error.strerror})") from error
            read_manifest(target)
            warn = partial(console.print, soft_wrap=True, markup=False)
            known = {by_token: ReferenceStore(target, by_token=by_token, warn=warn) for by_token in (False, True)}
            for path, fault in store.faults.items():
                console.print(f"{path}: {fault}; left out", soft_wrap=True, markup=False)
            for shard in store.shards:
                if (known[shard.token_logps is not None].find(shard.keys) >= 0).all():
                    continue
                write_atomically(target / shard.path.name, partial(shutil.copyfile, shard.path))
                copied, rows = copied + 1, rows + len(shard)
            if store.manifest and not (target / MANIFEST).exists():
                write_atomically(target / MANIFEST, partial(shutil.copyfile, store.folder / MANIFEST))
    console.print(f"Copied {copied} files, {rows:,} rows, into {arguments.into}", soft_wrap=True, markup=False)
    return 0
