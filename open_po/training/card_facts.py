"""What a run knows for its model's card, put together where it is known."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils._validators import validate_repo_id

from open_po.data.run_data import Data
from open_po.data.sources import is_data_file
from open_po.distributed.runtime import Runtime
from open_po.model_files import ModelSource, adapter_base, policy_source, reference_source
from open_po.output.card_facts import BaseModel, CardFacts
from open_po.output.private import last_part
from open_po.output.summary import RunResult
from open_po.reference import FilledStore
from open_po.training.trainer import Trainer

_LICENSE = ("license", "license_name", "license_link")


def card_facts(
    trainer: Trainer, data: Data, reference: FilledStore | None, result: RunResult, words: Sequence[str]
) -> CardFacts:
    """The facts for the card of the model as it is now; `words` are those of the run's command line."""
    config, runtime = trainer.config, trainer.runtime
    names = {part.dataset for part in (*config.data.training_mixture, *config.data.held_out_mixture)}
    other = reference_source(config)
    repository, revision = trainer.folder.hub_branch()
    started_from = policy_source(config)
    beneath = adapter_base(started_from.folder(), started_from.trust_remote_code)
    return CardFacts(
        config=config,
        command=words,
        result=result,
        held_out=None if data.held_out is None else data.held_out.totals(),
        base=base_model(started_from),
        adapters_on=None if beneath is None else (_name(beneath), beneath.revision),
        hub_datasets={name for name in names if not is_data_file(name) and _may_be_hub_name(name)},
        reference_name=None if other is None else _name(other),
        reference_key=None if reference is None else reference.store.folder.name,
        steps=trainer.steps,
        global_batch=trainer.state.global_batch,
        hardware=_hardware(runtime),
        parallel=runtime.parallelism.kind,
        has_chat_template=data.tokenizer.chat_template is not None,
        repository=repository,
        revision=None if revision == "main" else revision,
    )


def base_model(source: ModelSource) -> BaseModel:
    """A model as others know it.

    A folder has the Hub name that its own card gives as its base, or for adapters their configuration. Its
    `config.json` is not asked: what stands there as `_name_or_path` may be a path that only looks like a Hub name.
    """
    folder = source.folder()
    card = _card(folder)
    licensed = {name: card[name] for name in _LICENSE if isinstance(card.get(name), str)}
    if not licensed.get("license_link", "https://").startswith("https://"):  # a file that is not copied
        del licensed["license_link"]
    hub_name: str | None = source.name
    if Path(source.name).is_dir():
        named = card.get("base_model")
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        if named is None and (base := adapter_base(folder, source.trust_remote_code)) is not None:
            named = base.name
        hub_name = named if isinstance(named, str) and _may_be_hub_name(named) else None
    return BaseModel(name=_name(source), hub_name=hub_name, license=licensed)


def _name(source: ModelSource) -> str:
    return last_part(source.name) if Path(source.name).is_dir() else source.name


def _card(folder: Path) -> dict[str, Any]:
    """The metadata of the card in a folder; empty if there is none that can be read."""
    with suppress(Exception):  # it may be anything: no file, no text, no YAML
        return dict(metadata_load(folder / "README.md") or {})
    return {}


def _may_be_hub_name(name: str) -> bool:
    """Whether `name` is a repository's and nothing on this machine is called so."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        return not Path(name).expanduser().exists()
    return False


def _hardware(runtime: Runtime) -> str:
    """The devices of this machine that the run uses, without names of hosts, and how many machines there are."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count() if runtime.parallelism.kind == "layers" else runtime.local_world_size
        devices = f"{count} x {torch.cuda.get_device_name()}"
    else:
        devices = f"CPU, {_cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    return devices if runtime.nodes == 1 else f"{runtime.nodes} machines with {devices} each"


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
