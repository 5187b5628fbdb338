"""The model as of a checkpoint's step, with all that is told of it, for the Hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from open_po.config import RunConfig
from open_po.hub.publication import MODEL_FOLDER
from open_po.model.export import export_adapter, export_model
from open_po.model.numerics import saved_dtype
from open_po.model.scorer import Scorer
from open_po.output.curves import plot_curves
from open_po.output.metrics import read_metrics
from open_po.output.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class ModelOfStep:
    """Writes what is published of a step."""

    config: RunConfig
    folder: RunFolder
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    writes: bool  # on rank 0; the other ranks hand it their parts of the weights

    def __call__(self, checkpoint: Path) -> None:
        """Write it into the folder of a checkpoint; all ranks call this. Raises OSError."""
        target = checkpoint / MODEL_FOLDER if self.writes else None
        if target is not None:
            target.mkdir()
        if self.scorer.saves_adapters and not self.config.output.hf_merged:
            export_adapter(self.scorer, self.tokenizer, target)
        else:
            export_model(self.scorer, saved_dtype(self.config.output, self.scorer.numerics), self.tokenizer, target)
        if target is not None:
            self._tell(target)

    def _tell(self, target: Path) -> None:
        """What is known of the run by now."""
        for path in (self.folder.config, self.folder.metrics, self.folder.samples):
            if path.exists():
                shutil.copyfile(path, target / path.name)
        plot_curves(read_metrics(self.folder.metrics), target / self.folder.curves.name, self.config.title)
