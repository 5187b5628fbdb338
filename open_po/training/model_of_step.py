"""The model as of a checkpoint's step, with all that is told of it, for the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from open_po.data.run_data import Data
from open_po.hub.publication import MODEL_FOLDER
from open_po.model.export import export_adapter, export_model
from open_po.model.memory import peak_memory_bytes
from open_po.model.numerics import saved_dtype
from open_po.output.card import write_card
from open_po.output.metrics import evaluations, read_metrics
from open_po.reference import FilledStore
from open_po.training.card_facts import card_facts
from open_po.training.result import run_result
from open_po.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class ModelOfStep:
    """Writes what is published of the step that a trainer has come to."""

    trainer: Trainer
    data: Data
    reference: FilledStore | None
    words: Sequence[str]  # of the command line

    def __call__(self, checkpoint: Path) -> None:
        """Write it into the folder of a checkpoint; all ranks call this. Raises OSError."""
        scorer, output = self.trainer.scorer, self.trainer.config.output
        target = checkpoint / MODEL_FOLDER if self.trainer.runtime.is_main else None
        if scorer.saves_adapters and not output.hf_merged:
            export_adapter(scorer, self.data.tokenizer, target)
        else:
            export_model(scorer, saved_dtype(output, scorer.numerics), self.data.tokenizer, target)
        if target is not None:
            self._tell(target)

    def _tell(self, target: Path) -> None:
        """What is known of the run by now."""
        folder = self.trainer.folder
        for path in (folder.config, folder.metrics, folder.samples):
            if path.exists():
                shutil.copyfile(path, target / path.name)
        records = read_metrics(folder.metrics)
        result = run_result(self.trainer, self.data, self.reference, evaluations(records), peak_memory_bytes())
        write_card(target, card_facts(self.trainer, self.data, self.reference, result, self.words), records)
