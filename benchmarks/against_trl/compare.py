"""open_po against TRL's DPOTrainer: pairs/s of the reference pass and of training, memory, share of the matmul rate.

    python benchmarks/against_trl [--preset cpu|cuda|tiny] [--workloads chat short_pairs ...] [--out FILE.md]

Needs `pip install -c constraints.txt trl==1.16.0`. Both trainers get the same pairs with the same token ids, in the
same steps, for the same random model, precision, AdamW, learning rate and gradient clipping. Every measurement is a
fresh process. First a short search finds each side's fastest settings on this machine, allocator included; then the
sides take turns, and a time counts only if the losses of all steps and the reference log-probs of all pairs agree with
stock TRL's. Sides: `trl` as it is, `trl-patched` with only response tokens in the head (see trl_side.py; CUDA's stock
TRL does that by itself, so it is left out there), and `open_po`.

What a time is: the reference pass as each trainer does it, storing its results included. Loading the model is in no
figure, nor is open_po's check of its layout (at most three pairs, scored three times), in place of which TRL's model
scores its longest batch first, so that both begin warm. A step from its first forward pass to the end of the
optimizer's step, as each trainer's own loop sees it; the first step is not counted. Memory is the process's peak over
reference pass and training.

`--defaults`: open_po has no setting but batch and length, nor anything in its environment, and is measured as it comes:
what it measures of the machine is measured in each of its processes anew, within the time of the reference pass. Stock
TRL has its fastest settings, by the search.

`--preset cuda` without a GPU, or `--dry-run`, prints what would run. `--settings FILE.json` takes settings that an
earlier run found (it writes them beside --out) instead of searching.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import comparison_report
from comparison_report import BUSY
from measuring import Bench, Measurement, MeasurementError, built, disagreement
from open_po_side import OpenPoSettings
from presets import PRESETS, Preset, Settings, Side, Stage, sides_of
from trl_side import TrlSettings, config_arguments
from workloads import Workload, build_command, counts, skipped_flops, useful_flops

NOISE = 0.02  # of a speed that was measured once
RATE_TOKENS = 2048  # of the packs whose matmul rate is measured where open_po chooses by itself


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A row of a search's table."""

    settings: Settings
    training: float | None = None  # pairs/s
    reference: float | None = None
    peak_bytes: int | None = None
    failure: str | None = None


def candidates(best: Settings, stage: Stage) -> list[Settings]:
    """`best` with each of the stage's values."""
    values = zip(*stage.values(), strict=True)
    return [replace(best, **dict(zip(stage, chosen, strict=True))) for chosen in values]


def search(side: Side, try_out: Callable[[Settings], Trial]) -> tuple[Settings, list[Trial]]:
    """The fastest settings, one stage after the other; fields of the reference pass are chosen by its own speed.

    Of settings that are as fast, within a measurement's noise, those with the least memory are taken. Raises
    MeasurementError if nothing works at all.
    """
    best, trials = side.start, {}
    for stage in side.stages:
        tried = candidates(best, stage)
        for settings in tried:
            if settings not in trials:
                trials[settings] = try_out(settings)
        done = [trials[settings] for settings in tried if trials[settings].failure is None]
        if not done:
            continue
        by_training, by_reference = (_leanest_of_fastest(done, speed) for speed in ("training", "reference"))
        best = replace(
            best,
            **{name: getattr(by_reference if name.startswith("reference") else by_training, name) for name in stage},
        )
    if trials and all(trial.failure is not None for trial in trials.values()):
        raise MeasurementError(f"{side.name}: no settings work ({next(iter(trials.values())).failure})")
    return best, list(trials.values())


def _leanest_of_fastest(trials: Sequence[Trial], speed: str) -> Settings:
    fastest = max(getattr(trial, speed) for trial in trials)
    as_fast = [trial for trial in trials if getattr(trial, speed) >= (1 - NOISE) * fastest]
    return min(as_fast, key=lambda trial: trial.peak_bytes or 0).settings


def find_settings(
    bench: Bench, sides: Sequence[Side], steps: int
) -> tuple[dict[str, Settings], dict[str, list[Trial]]]:
    """Each side's fastest settings, and the tables of the search. Settings that change a value count as failed."""
    preset = bench.preset
    expected: Measurement | None = None  # stock TRL's
    found: dict[str, Settings] = {}
    tables: dict[str, list[Trial]] = {}

    def try_out(settings: Settings) -> Trial:
        nonlocal expected
        try:
            measured = bench.measure(settings, steps)
        except MeasurementError as error:
            say(f"    {settings}: {error}")
            return Trial(settings=settings, failure=str(error))
        if expected is None and isinstance(settings, TrlSettings) and settings.head == "stock":
            expected = measured
        failure = None if expected is None else disagreement(measured, expected, preset)
        trial = Trial(
            settings=settings,
            training=measured.training_rate(preset.global_batch),
            reference=measured.reference_rate(),
            peak_bytes=measured.peak_bytes,
            failure=failure,
        )
        rates = f"{trial.training:.2f} pairs/s, reference {trial.reference:.2f} pairs/s"
        say(f"    {settings}: {failure or rates}{busy(measured.others)}")
        return trial

    for side in sides:
        say(f"  search, {side.name}")
        found[side.name], tables[side.name] = search(side, try_out)
    return found, tables


# -------------------------------------------------------------------------------------------------------------- whole


def compare(bench: Bench, settings: dict[str, Settings], steps: int, repeats: int) -> comparison_report.Comparison:
    """The sides in turn, `repeats` times, with the matmul rate before, between and after."""
    preset, workload = bench.preset, bench.workload
    drawn = [[bench.ids[i] for i in step] for step in bench.steps(steps)]
    flops = [useful_flops(workload.shape, pairs) for pairs in drawn]
    computed = [useful - skipped_flops(workload.shape, pairs) for useful, pairs in zip(flops, drawn, strict=True)]
    ours = settings["open_po"]
    assert isinstance(ours, OpenPoSettings)
    step = round(counts(bench.ids)["distinct"] * preset.global_batch)
    tokens = min(ours.tokens or RATE_TOKENS, step)

    def read_rate() -> float:
        rate, others = bench.matmul_rate(tokens)
        say(f"  matmul rate {rate / 1e9:.0f} GFLOP/s{busy(others)}")
        return rate

    rates = [read_rate()]
    measured: dict[str, list[Measurement]] = {name: [] for name in settings}
    for repeat in range(repeats):
        names = list(settings)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            found = bench.measure(settings[name], steps)
            measured[name].append(found)
            speeds = f"{found.training_rate(preset.global_batch):.2f} pairs/s, reference {found.reference_rate():.2f}"
            say(f"  round {repeat + 1}, {name}: {speeds}{busy(found.others)}")
        rates.append(read_rate())
    rate = statistics.median(rates)
    expected = measured["trl"][0]
    reference_flops = useful_flops(workload.shape, bench.ids, backward=False)
    rows = []
    for name, runs in measured.items():
        differences = [run.difference(expected) for run in runs]
        rows.append(
            comparison_report.Row(
                side=name,
                settings="; ".join(dict.fromkeys([str(settings[name]), *(run.chosen for run in runs if run.chosen)])),
                training=[run.training_rate(preset.global_batch) for run in runs],
                reference=[run.reference_rate() for run in runs],
                peak_bytes=[run.peak_bytes for run in runs],
                share=statistics.median(run.share(flops, rate) for run in runs),
                computed_share=statistics.median(run.share(computed, rate) for run in runs)
                if name == "open_po"
                else None,
                reference_share=statistics.median(reference_flops / run.reference_seconds / rate for run in runs),
                logp_difference=max(logps for logps, _ in differences),
                loss_difference=max(losses for _, losses in differences),
                others=max(run.others for run in runs),
                invalid=next((why for run in runs if (why := disagreement(run, expected, preset))), None),
                losses=runs[0].losses,
            )
        )
    return comparison_report.Comparison(
        workload=workload.name,
        about=workload.about,
        shape=str(workload.shape),
        counts=counts(bench.ids),
        pairs=len(bench.ids),
        rates=rates,
        rate_tokens=tokens,
        rows=rows,
        targets=preset.targets.get(workload.name),
        work=comparison_report.work_line(workload.shape, bench.ids),
    )


def describe(arguments: argparse.Namespace) -> None:
    """Print what a run would do, without doing any of it."""
    preset, seed, search_steps = arguments.preset, arguments.seed, arguments.search_steps
    rounds = f"{arguments.repeats} rounds of {arguments.steps} steps"
    say(f"device {preset.device}, global batch {preset.global_batch} pairs, {rounds}")
    for workload in arguments.workloads:
        ids, shape = workload.draw(seed), workload.shape
        bench = Bench(preset=preset, workload=workload, ids=ids, folder=Path(workload.name), seed=seed, threads=1)
        say(f"\n{workload.name}: {workload.about}; {len(ids)} pairs")
        say(f"  model: {shape}; parameters: body {shape.body_parameters:,}, head {shape.head_parameters:,}")
        say(f"  tokens: {comparison_report.token_line(counts(ids))}")
        say(f"  {comparison_report.work_line(shape, ids)}")
        say(f"  useful FLOPs of the first step: {useful_flops(shape, [ids[i] for i in bench.steps(1)[0]]):.3g}")
        say(f"  build: {' '.join(build_command(shape, bench.folder / 'model', seed)[1:])}")
        for side in sides_of(preset, workload, defaults=arguments.defaults):
            tried = dict.fromkeys(s for stage in side.stages for s in candidates(side.start, stage)) or [side.start]
            say(f"  {side.name}: search over {search_steps} steps each, every later stage with the best so far")
            for settings in tried:
                if isinstance(settings, TrlSettings):
                    job = bench.trl_job(settings, search_steps, "OUTPUT")
                    say(f"    {settings}\n      DPOConfig({config_arguments(job)})")
                else:
                    words = bench.open_po_job(settings, search_steps, "OUTPUT").arguments()
                    say(f"    {settings}\n      dpo_tune_cache.py {' '.join(words)}")


def busy(others: float) -> str:
    """A word of warning, if there is cause."""
    return f"; other work took {others:.0%} of the CPUs' time" if others > BUSY else ""


def say(line: str) -> None:
    print(line, flush=True)


def load_settings(earlier: dict[str, Any], workload: Workload, sides: Sequence[Side]) -> dict[str, Settings]:
    """What an earlier run found for this workload; defaults are what they are."""
    found = earlier[workload.name]
    fixed = OpenPoSettings.defaults()
    return {side.name: side.start if side.start == fixed else type(side.start)(**found[side.name]) for side in sides}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--workloads", nargs="+", metavar="NAME", help="default: the preset's own; `all` adds its extra ones"
    )
    parser.add_argument("--repeats", type=int, help="rounds in which every side is measured once")
    parser.add_argument("--steps", type=int, help="optimizer steps of a measurement, the first not counted")
    parser.add_argument("--search-steps", type=int, help="the same in the search")
    parser.add_argument("--attempts", type=int, help="at a measurement that other work on the machine disturbs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of every process, on a CPU")
    parser.add_argument("--defaults", action="store_true", help="open_po with nothing set but batch and length")
    parser.add_argument("--settings", type=Path, help="JSON of an earlier run's settings, instead of a search")
    parser.add_argument("--out", type=Path, help="Markdown file; a plot and the settings are written beside it")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    arguments = parser.parse_args(words)
    preset: Preset = PRESETS[arguments.preset]()
    named = {workload.name: workload for workload in preset.workloads + preset.extra_workloads}
    wanted = arguments.workloads or [workload.name for workload in preset.workloads]
    wanted = list(named) if wanted == ["all"] else wanted
    if unknown := [name for name in wanted if name not in named]:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(named)}")
    if arguments.attempts is not None:
        preset = replace(preset, attempts=max(1, arguments.attempts))
    for name in ("repeats", "steps", "search_steps"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(preset, name))
    if min(arguments.steps, arguments.search_steps) < 2 or arguments.repeats < 1:
        parser.error("a measurement needs two steps, of which the first is not counted, and one round")
    if arguments.settings is not None:
        try:
            arguments.settings = json.loads(arguments.settings.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--settings {arguments.settings}: cannot be read ({error})")
        if missing := sorted(set(wanted) - set(arguments.settings)):
            parser.error(f"--settings: says nothing of {', '.join(missing)}")
    arguments.preset_name, arguments.preset = arguments.preset, preset
    arguments.workloads = [named[name] for name in wanted]
    return arguments


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(words: Sequence[str] | None = None) -> int:
    """The exit code: 1 if a workload could not be measured, else 0."""
    arguments = parse(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a stopped run leaves nothing behind
    preset: Preset = arguments.preset
    if arguments.dry_run or (preset.device == "cuda" and not has_gpu()):
        say("Nothing is run: " + ("--dry-run" if arguments.dry_run else "no GPU here. This is what would be:"))
        describe(arguments)
        return 0
    report = comparison_report.Report(
        device=preset.device,
        threads=arguments.threads,
        global_batch=preset.global_batch,
        about=(PRESETS[arguments.preset_name].__doc__ or "").splitlines()[0],
        defaults=arguments.defaults,
    )
    chosen: dict[str, dict[str, Any]] = {}
    failed = 0
    for workload in arguments.workloads:
        say(f"{workload.name}: {workload.about}")
        try:
            with built(preset, workload, arguments.seed, arguments.threads) as bench:
                sides = sides_of(preset, workload, defaults=arguments.defaults)
                if arguments.settings:
                    settings, tables = load_settings(arguments.settings, workload, sides), {}
                else:
                    settings, tables = find_settings(bench, sides, arguments.search_steps)
                comparison = compare(bench, settings, arguments.steps, arguments.repeats)
        except MeasurementError as error:
            say(f"  {workload.name} is left out: {error}")
            failed = 1
            continue
        chosen[workload.name] = {name: asdict(found) for name, found in settings.items()}
        report.comparisons.append(replace(comparison, searches=comparison_report.search_rows(tables)))
        say(comparison_report.console(report.comparisons[-1]))
        if arguments.out:  # after every workload: a long run that is stopped leaves what it has
            report.write(arguments.out)
            arguments.out.with_suffix(".settings.json").write_text(json.dumps(chosen, indent=2) + "\n")
    return failed
