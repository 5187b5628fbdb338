"""The reference pass alone: `python -m open_po cache build`."""

from __future__ import annotations

from open_po.config import RunConfig
from open_po.data.run_data import prepare_data
from open_po.distributed.runtime import Runtime
from open_po.model.numerics import reference_numerics
from open_po.model_files import policy_source
from open_po.output.tables import make_table
from open_po.reference import log_probs_of, open_cache, separate_reference


def build(config: RunConfig, runtime: Runtime) -> None:
    """Compute and store the reference log-probs of a run, as it would do at its start."""
    if not config.loss.mix().needs_reference:
        runtime.say(f"loss_type {', '.join(config.loss.names)} uses no reference log-probs: there is nothing to build")
        return
    runtime.on_each_node(open_cache, config)
    data = prepare_data(config, runtime)
    reference = separate_reference(config, runtime, data)
    if reference is None:
        numerics = runtime.from_main(reference_numerics, config, runtime.device, runtime.parallelism)
        reference = log_probs_of(policy_source(config), numerics, config, runtime, data, label="Reference model")
    done = reference.totals
    table = make_table("Reference log-probs", "what", "value")
    table.add_row("pairs", f"{done.pairs_computed + done.pairs_reused:,}, of which {done.pairs_reused:,} were there")
    table.add_row("computed here", f"{done.responses_computed:,} responses in {done.seconds:.1f} s")
    table.add_row("store", reference.store.folders())
    runtime.console.print(table)
