"""SFT, preference training from it, and evaluation, as one command that goes on where it was stopped.

    python -m open_po pipeline MODEL TASK LOSS [LOSS ...] [--skip-sft] [--restart] [--dry-run] [--field value ...]

MODEL, TASK and LOSS name overlays, configs/models/MODEL.yaml, configs/tasks/TASK.yaml and configs/losses/LOSS.yaml, or
are YAML files. The stages are

    prepare      configs/tasks/TASK/prepare.sh, if it is there: makes what the task needs
    sft          MODEL, TASK_sft.yaml, if it is there; else preferences start from MODEL itself
    LOSS         MODEL, TASK, LOSS and TASK/LOSS.yaml, if it is there, from the SFT stage's model; one for each loss
    evaluation   python -m open_po evaluate with the flags of TASK/evaluate.yaml, all models in one table

in OUTPUT_DIR (default output/EXP_NAME; EXP_NAME by default MODEL_TASK), each a process with a log in OUTPUT_DIR/logs.
--field value is for the preference stages, --sft.field value for SFT, --evaluate.flag value for evaluation. All losses
share the SFT stage and its reference log-probs. With several GPUs, or NUM_NODES, GPUS_PER_NODE and what else
`python -m open_po launch` reads, stages that train start through it, and evaluation uses all GPUs of the first node; on
several nodes give each the same command.

Exit codes: 0 all stages are complete; 75 a stage was stopped after saving, the same command goes on; 130 Ctrl-C; 2 a
mistake in the configuration; 1 a stage failed.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence

from open_po.commands import evaluate
from open_po.commands.command_line import CommandParser, refused, show
from open_po.commands.pipeline_overlays import Overlays
from open_po.commands.pipeline_stages import Pipeline, read_pipeline
from open_po.errors import ConfigError, UserError, user_line


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    parser = CommandParser(prog="python -m open_po pipeline", description=__doc__, usage="%(prog)s MODEL TASK LOSS ...")
    parser.add_argument("--skip-sft", action="store_true", help="preferences start from MODEL itself")
    parser.add_argument("--restart", action="store_true", help="run anew what was run with other settings")
    parser.add_argument("--dry-run", action="store_true", help="print the command of every stage; start nothing")
    options, rest = parser.parse_known_args(words[len(names) :])
    try:
        if rest and not rest[0].startswith("--"):
            raise ConfigError([f"{rest[0]}: MODEL TASK LOSS come first, then flags"])
        pipeline = read_pipeline(Overlays.find(names), rest, skip_sft=options.skip_sft)
        if pipeline.evaluate is not None:
            evaluate.read_words(pipeline.evaluation_words())  # whose mistakes would be told after hours of training
        return _go(pipeline, dry=options.dry_run, restart=options.restart)
    except ConfigError as error:
        return refused(error)
    except (UserError, OSError) as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        print(f"{'stopped' if code == os.EX_TEMPFAIL else 'error'}: {user_line(error)}", file=sys.stderr)
        return code


def _go(pipeline: Pipeline, *, dry: bool, restart: bool) -> int:
    import torch  # which takes seconds, for the number of GPUs

    from open_po.commands.pipeline_run import PipelineRun, StoppedError, dry_run
    from open_po.commands.place import is_rank, read_place

    if is_rank(os.environ):
        raise ConfigError(["torchrun: a pipeline is no run; start it by itself, it starts the ranks of each stage"])
    place = read_place(os.environ, torch.cuda.device_count(), dry=True)
    if dry:
        show("\n".join(dry_run(pipeline, place)))
        return 0
    try:
        PipelineRun(pipeline=pipeline, place=place, restart=restart).run()
    except StoppedError as stopped:
        print(f"stopped: {stopped.line}", file=sys.stderr)
        return stopped.exit_code
    return 0
