"""The log-probs and rewards of `python -m open_po score`: computed, written and summed up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from open_po.commands.command_line import refuse_unwritable
from open_po.config import RunConfig
from open_po.data.run_data import Data, prepare_data
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from open_po.evaluation.breakdown import break_down, reward_statistics
from open_po.losses import PairLogps
from open_po.model.numerics import frozen_numerics
from open_po.model_files import policy_source
from open_po.output.estimate import Groups
from open_po.output.files import disk_faults, write_atomically
from open_po.output.metrics import REWARD_ACCURACY, REWARD_MARGIN
from open_po.output.tables import groups_table
from open_po.reference import log_probs_of, open_cache, separate_reference


def score(config: RunConfig, runtime: Runtime, out: Path, beta: float) -> None:
    """Score the data under the policy, and under the reference if there is one, and write one line a pair."""
    runtime.on_main(_check, out, config)
    runtime.on_each_node(open_cache, config)
    data = prepare_data(config, runtime, label="Data", compared_by="score")

    numerics = runtime.from_main(frozen_numerics, config.model, runtime.device)
    scored = log_probs_of(policy_source(config), numerics, config, runtime, data, label="Model")
    policy = runtime.on_every_rank(scored.store.logps_of, data.train)
    under_reference = None
    if config.reference.reference_model_name_or_path is not None:
        reference = separate_reference(config, runtime, data) or scored  # the model itself
        under_reference = runtime.on_every_rank(reference.store.logps_of, data.train)
    rows = _rows(data, policy, under_reference, beta)

    def write(path: Path) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def finish() -> None:
        with disk_faults(str(out), "log-probs are kept in the cache"):
            write_atomically(out, write)
        groups = None
        if under_reference is not None:
            chosen = beta * (policy.chosen - under_reference.chosen)
            rejected = beta * (policy.rejected - under_reference.rejected)
            groups = break_down(reward_statistics(chosen, rejected), data.train)
        runtime.console.print(_table(policy, groups, beta, out))
        if groups is not None:
            runtime.console.print(groups_table(groups, "By source and length"))

    runtime.on_main(finish)


def _check(out: Path, config: RunConfig) -> None:
    """Raises UserError, before anything takes long, if `out` cannot be, or is a file that is read."""
    read = {Path(part.dataset).resolve() for part in config.data.training_mixture}
    if out.resolve() in read:
        raise UserError(f"--out {out}: is the data that is scored; choose another file")
    refuse_unwritable(out)


def _rows(data: Data, policy: PairLogps, reference: PairLogps | None, beta: float) -> list[dict[str, Any]]:
    columns: dict[str, Sequence[Any]] = {
        "pair": data.train.origins,
        "chosen_logps": policy.chosen.tolist(),
        "rejected_logps": policy.rejected.tolist(),
        "chosen_tokens": policy.chosen_tokens.int().tolist(),
        "rejected_tokens": policy.rejected_tokens.int().tolist(),
    }
    if reference is not None:
        columns |= {
            "reference_chosen_logps": reference.chosen.tolist(),
            "reference_rejected_logps": reference.rejected.tolist(),
            "chosen_rewards": (beta * (policy.chosen - reference.chosen)).tolist(),
            "rejected_rewards": (beta * (policy.rejected - reference.rejected)).tolist(),
        }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _table(policy: PairLogps, groups: Groups | None, beta: float, out: Path) -> Table:
    table = Table(title="Scores", title_justify="left", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value", overflow="fold")
    table.add_row("pairs", f"{len(policy.chosen):,}")
    tokens = policy.chosen_tokens.mean(), policy.rejected_tokens.mean()
    table.add_row("log-probs", f"chosen {policy.chosen.mean():.2f}, rejected {policy.rejected.mean():.2f} nats (means)")
    table.add_row("tokens", f"chosen {tokens[0]:.1f}, rejected {tokens[1]:.1f} (means)")
    likelier = (policy.chosen > policy.rejected).float().mean()
    by_token = policy.chosen / policy.chosen_tokens > policy.rejected / policy.rejected_tokens
    table.add_row("chosen is likelier", f"{likelier:.1%} of pairs; per token {by_token.float().mean():.1%}")
    if groups is not None:
        accuracy, margin = (groups.all.figures[name] for name in (REWARD_ACCURACY, REWARD_MARGIN))
        table.add_row("reward accuracy", f"{accuracy.value:.1%} (a tie counts half)")
        table.add_row("reward margin", f"{margin.value:.4f} (beta {beta:g})")
    table.add_row("output", str(out))
    return table
