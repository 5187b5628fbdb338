"""What a model card is made of, besides the run's metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from open_po.config import RunConfig
from open_po.output.private import last_part
from open_po.output.summary import DataTotals, RunResult


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that training started from."""

    name: str  # a Hub name, or a folder's without the folders that it lies in
    hub_name: str | None  # its own on the Hub, or what the card in its folder calls its base; None: unknown
    license: Mapping[str, str]  # metadata of its card: license, license_name, license_link


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What is known of a model, as of the step that `result` is of."""

    config: RunConfig
    command: Sequence[str]  # the words behind the program's name
    result: RunResult
    held_out: DataTotals | None
    base: BaseModel
    hub_datasets: Collection[str]  # the names of data sets that are the Hub's
    reference_name: str | None  # how the reference model is called; None: the weights before the first step
    reference_key: str | None  # of the store of reference log-probs; None: the loss uses none
    steps: int  # of the whole run
    global_batch: int  # pairs of a step
    hardware: str
    parallel: str  # the engine
    has_chat_template: bool
    adapters_on: tuple[str, str | None] | None = None  # the model that adapters load on and its revision, if not `base`
    repository: str | None = None  # on the Hub, if the model goes there
    revision: str | None = None

    @property
    def folder(self) -> str:
        """The name of the run's folder."""
        return last_part(self.config.output.output_dir)

    @property
    def is_final(self) -> bool:
        """Whether the model is that of the run's last step."""
        return self.result.train.steps == self.steps

    def data_name(self, name: str) -> str:
        """How a data set is called: by its Hub name, or a file's without its folders."""
        return name if name in self.hub_datasets else last_part(name)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a card lies."""

    curves: str | None  # the picture, from there
    is_adapter: bool = False  # beside adapters, not a whole model
    subfolder: str | None = None  # of the run's folder, or of the repository

    def without_curves(self) -> Place:
        """The same place without the picture."""
        return dataclasses.replace(self, curves=None)
