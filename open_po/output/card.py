"""The model card: README.md beside a saved model, for the Hub and for people, made with the Hub's own card classes."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from open_po.losses import LOSSES
from open_po.output.card_facts import CardFacts, Place
from open_po.output.card_text import card_text
from open_po.output.curves import plot_curves
from open_po.output.files import write_atomically
from open_po.output.metrics import LOSS, REWARD_ACCURACY, REWARD_MARGIN, STEP, Metrics, evaluations
from open_po.output.private import without_secrets
from open_po.output.run_folder import CURVES

_ADAPTER_FILE, _ADAPTER_FOLDER = "adapter_config.json", "adapter"
# Figures of the model index: its type, and what a person calls it.
_RESULTS = {
    REWARD_ACCURACY: ("accuracy", "reward accuracy"),
    REWARD_MARGIN: ("reward_margin", "reward margin"),
    LOSS: ("loss", "preference loss"),
}


def write_card(folder: Path, facts: CardFacts, records: Sequence[Metrics]) -> None:
    """Write the card of the model in `folder`, README.md, and the curves that it shows, training_curves.png.

    `records` are those of metrics.jsonl up to the step that the model is of. Adapters get a card that says how they
    are loaded, whether `folder` holds them itself or beside the merged model in `adapter/`. Raises OSError.
    """
    picture = folder / CURVES
    plot_curves(records, picture, facts.config.title)
    places = {folder: Place(curves=CURVES, is_adapter=(folder / _ADAPTER_FILE).is_file())}
    if (folder / _ADAPTER_FOLDER / _ADAPTER_FILE).is_file():
        # On the Hub the folder is the repository, unless the merged model is there too.
        alone = facts.repository is not None and not facts.config.output.hf_merged
        inside = Place(curves=CURVES, is_adapter=True, subfolder=None if alone else _ADAPTER_FOLDER)
        places[folder / _ADAPTER_FOLDER] = inside
        if picture.is_file():
            shutil.copyfile(picture, folder / _ADAPTER_FOLDER / CURVES)
    for target, place in places.items():
        place = place if picture.is_file() else place.without_curves()
        write_atomically(target / "README.md", model_card(facts, records, place).save)


def model_card(facts: CardFacts, records: Sequence[Metrics], place: Place) -> ModelCard:
    """The card, parsed back from its own text."""
    metadata = card_metadata(facts, records, place).to_yaml()
    return ModelCard(without_secrets(f"---\n{metadata}\n---\n\n{card_text(facts, records, place)}"))


def card_metadata(facts: CardFacts, records: Sequence[Metrics], place: Place) -> ModelCardData:
    """What the Hub reads of a card. Names of data sets and of the base model are Hub names, or left out."""
    config = facts.config
    results = eval_results(facts, records)
    mix = config.loss.mix()
    tags = ["open_po", *(["preference-optimization"] if mix.needs_rejected else [])]
    tags += [name for name in config.loss.names if name in LOSSES]
    tags += ["lora"] * config.model.use_lora + ["qlora"] * config.model.use_qlora
    mixture = dict.fromkeys(part.dataset for part in config.data.training_mixture)
    license: dict[str, Any] = dict(facts.base.license)
    return ModelCardData(
        base_model=facts.base.hub_name,
        datasets=[name for name in mixture if name in facts.hub_datasets] or None,
        library_name="peft" if place.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=config.output.exp_name if results else None,
        eval_results=results or None,
        **license,
    )


def eval_results(facts: CardFacts, records: Sequence[Metrics]) -> list[EvalResult]:
    """The held-out figures of this very step: none if the last evaluation was an earlier step's."""
    last = next((record for record in evaluations(records) if record[STEP] == facts.result.train.steps), None)
    parts = facts.config.data.held_out_mixture
    if last is None or not parts:
        return []
    names = list(dict.fromkeys(facts.data_name(part.dataset) for part in parts))
    from_hub = len(parts) == 1 and parts[0].dataset in facts.hub_datasets
    return [
        EvalResult(
            task_type="text-generation",
            task_name="preference pairs",
            dataset_type=_dataset_type(names),
            dataset_name=" + ".join(names),
            dataset_split=parts[0].split if from_hub else None,
            metric_type=kind,
            metric_name=said,
            metric_value=last[name],
        )
        for name, (kind, said) in _RESULTS.items()
        if name in last and math.isfinite(last[name])
    ]


def _dataset_type(names: Sequence[str]) -> str:
    """A Hub name, or what may stand in the place of one."""
    if len(names) > 1:
        return "mixture"
    return re.sub(r"[^A-Za-z0-9_./-]+", "_", names[0])
