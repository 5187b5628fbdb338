"""One reference pass, then a run for every setting of a grid.

    python -m open_po sweep CONFIG.yaml [MORE.yaml ...] --grid NAME=VALUE,VALUE ... [--jobs N] [--devices 0,1]
                            [--field value ...]

for example --grid learning_rate=5e-8,1e-7,2e-7,3e-7 beta=0.01,0.05,0.1 gamma=0,0.5,1. Runs are processes of their own
in OUTPUT_DIR/runs, --jobs at a time (one for each of --devices, or one). A run that fails is tried once more. sweep.csv
and sweep.png hold each setting's last held-out evaluation. What is stopped goes on when the same command runs again.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from open_po.commands.command_line import CommandParser, refused
from open_po.commands.grid import FIGURES, NOT_STARTED, Run, flags, read_grid, setting_name
from open_po.commands.processes import Slots, last_line
from open_po.config import FIELDS, HELD_OUT_FIELDS, RunConfig, load_config
from open_po.errors import ConfigError, UserError, user_line
from open_po.optimizers import OPTIMIZERS
from open_po.output.console import make_console
from open_po.output.curves import plot_settings
from open_po.output.files import lock_folder, write_atomically
from open_po.output.metrics import REWARD_ACCURACY, REWARD_MARGIN
from open_po.output.run_folder import RunFolder, changed_fields
from open_po.output.summary import Status

_ATTEMPTS = 2
# New adapters do not change what the reference gives.
_NO_LORA: dict[str, Any] = {
    name: None for name, field in FIELDS.items() if field.about.needs == "use_lora" and name != "lora_start"
}


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code: 1 if a run failed, 130 if the sweep was stopped."""
    configs = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    parser = CommandParser(prog="python -m open_po sweep", description=__doc__)
    parser.add_argument("--grid", nargs="+", required=True, metavar="NAME=VALUE,VALUE", help="fields and their values")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one for each device, or one)")
    parser.add_argument("--devices", help="GPUs to spread the runs over: 0,1")
    arguments, rest = parser.parse_known_args(words[len(configs) :])
    console = make_console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        devices = arguments.devices.split(",") if arguments.devices else [None]
        jobs = len(devices) if arguments.jobs is None else arguments.jobs
        if jobs < 1:
            raise ConfigError([f"--jobs: must be above 0, got {jobs}"])
        sweep = Sweep.read([*configs, *rest], arguments.grid, console)
        if arguments.devices and not _has_gpu():
            raise ConfigError([f"--devices {arguments.devices}: there is no GPU here; leave it out"])
        return sweep.run(Slots.of(devices, jobs))
    except ConfigError as error:
        return refused(error)
    except (UserError, OSError) as error:
        print(f"error: {user_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All runs of a grid, and the folder that they lie in."""

    runs: list[Run]
    folder: Path
    console: Console

    @staticmethod
    def read(words: Sequence[str], grid: Sequence[str], console: Console) -> Sweep:
        """The sweep of a configuration. Raises ConfigError with every problem of any setting."""
        settings = read_grid(grid)
        problems: dict[str, None] = {}
        configs: list[RunConfig] = []
        for setting in settings:
            try:
                configs.append(load_config([*words, *flags(setting)]))
            except ConfigError as error:
                problems |= dict.fromkeys(error.problems)
        if not problems and not configs[0].data.held_out_mixture:
            problems["eval_mixer_list: is required, a sweep compares runs on held-out data"] = None
        if not problems and any(config.output.push_to_hub for config in configs):
            problems["push_to_hub: runs of a sweep would overwrite each other's model; upload the best by hand"] = None
        for (one, mine), (other, theirs) in itertools.combinations(zip(settings, configs, strict=False), 2):
            if not problems and mine == theirs:
                problems[f"--grid: {setting_name(one)} and {setting_name(other)} are the same run; leave one out"] = (
                    None
                )
        if problems:
            raise ConfigError(list(problems))
        folder = Path(configs[0].output.output_dir)
        needs_token = any(config.loss.mix().ld_alpha != 1.0 for config in configs)
        shared = ["--reference_cache_level", "token"] if needs_token else []
        runs = []
        for setting, config in zip(settings, configs, strict=True):
            name = setting_name(setting).replace("/", "_")
            own = {"output_dir": str(folder / "runs" / name), "exp_name": f"{config.output.exp_name}_{name}"}
            # The reference pass at the sweep's start has verified the cache.
            own |= {"resume_from_checkpoint": "auto", "verify_reference_rows": "0"}
            runs.append(
                Run(
                    setting=setting,
                    folder=RunFolder(folder / "runs" / name),
                    log=folder / "logs" / f"{name}.log",
                    words=[*words, *flags(setting), *shared, *flags(own)],
                    config=config,
                )
            )
        return Sweep(runs=runs, folder=folder, console=console)

    # ----------------------------------------------------------------------------------------------------- running them

    def run(self, slots: Slots) -> int:
        """Run what is not complete yet. Raises UserError if the folder holds another sweep."""
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {self.folder}: no folder can be made there ({error.strerror})") from error
        held = lock_folder(self.folder, f"output_dir {self.folder}: another sweep")
        try:
            return self._run_locked(slots)
        finally:
            if held is not None:
                os.close(held)

    def _run_locked(self, slots: Slots) -> int:
        self._refuse_other_sweep()
        left = [run for run in self.runs if not run.done()]
        self._say(f"Sweep of {len(self.runs)} runs in {self.folder}, {len(self.runs) - len(left)} complete already")
        try:
            if left:
                left = self._reference_pass(left, slots)
                self._run_all(left, slots)
        finally:
            slots.stop()
            self._write()
        return self._report()

    def _refuse_other_sweep(self) -> None:
        """Runs of other grids may lie there, if they differ from these in nothing but the fields of a grid."""
        if RunFolder(self.folder).config.exists():
            raise UserError(f"output_dir {self.folder}: holds a training run; choose another folder with --output_dir")
        mine = {run.folder.path: run for run in self.runs}
        for path in (self.folder / "runs").glob("*"):
            run = mine.get(path, self.runs[0])
            with suppress(OSError, yaml.YAMLError):
                theirs = yaml.safe_load((path / "config.yaml").read_text())
                free = set() if path in mine else {*run.setting, *re.findall(r"(?:^|,)(\w+)=", path.name)}
                if "loss_type" in free:  # it sets others
                    free |= {name for name, field in FIELDS.items() if field.section == "loss"}
                changed = isinstance(theirs, dict) and changed_fields(
                    theirs, run.config, free=free, more=HELD_OUT_FIELDS
                )
                if changed:
                    raise UserError(
                        f"output_dir {self.folder}: holds a sweep of another configuration ({changed}); choose another "
                        "folder"
                    )

    def _reference_pass(self, runs: Sequence[Run], slots: Slots) -> list[Run]:
        """Fill the cache with what the runs need: once, unless settings differ in model, data or reference.

        Returns the runs that can start.
        """
        needs: dict[str, list[Run]] = {}
        for run in runs:
            config = run.config
            if config.loss.mix().needs_reference:
                model = replace(config.model, **_NO_LORA)
                # Which decides what the policy's weights are kept in, and so its log-probs as its own reference.
                coarse = OPTIMIZERS[config.train.optimizer].keeps_small_updates
                needs.setdefault(repr((model, config.data, config.reference, coarse)), []).append(run)
        failed: list[Run] = []
        for number, group in enumerate(needs.values()):
            run = group[0]
            log = self.folder / "logs" / f"reference{number or ''}.log"
            self._say(f"Reference pass (log: {log})")
            start = time.monotonic()
            words = [*run.words, "--verify_reference_rows", str(run.config.reference.verify_reference_rows)]
            code = slots.run_alone([sys.executable, "-m", "open_po", "cache", "build", *words], log)
            if code:
                failed += group
                names = "; ".join(each.name for each in group)
                self._say(f"Reference pass: failed ({last_line(log)}), so these do not start: {names}")
            else:
                self._say(f"Reference pass: {time.monotonic() - start:.0f} s")
        return [run for run in runs if run not in failed]

    def _run_all(self, left: Sequence[Run], slots: Slots) -> None:
        waiting = [(run, 1) for run in left]
        done = len(self.runs) - len(left)
        while waiting or slots.busy:
            while waiting and slots.free:
                run, attempt = waiting.pop(0)
                slots.start((run, attempt), [sys.executable, "-m", "dpo_tune_cache", *run.words], run.log)
            for (run, attempt), code, seconds in slots.ended():
                if code == 0 and run.done():
                    done += 1
                    found = run.result()
                    figures = (
                        ""
                        if found[REWARD_ACCURACY] is None
                        else (
                            f"held-out reward accuracy {found[REWARD_ACCURACY]:.1%}, "
                            f"margin {found[REWARD_MARGIN]:.4f}, "
                        )
                    )
                    self._say(f"[{done}/{len(self.runs)}] {run.name}: {figures}{seconds:.0f} s")
                elif attempt < _ATTEMPTS:
                    self._say(f"{run.name}: failed, is tried again ({last_line(run.log)})")
                    waiting.append((run, attempt + 1))
                else:
                    done += 1
                    self._say(f"[{done}/{len(self.runs)}] {run.name}: failed twice ({last_line(run.log)})")
                self._write()
            slots.wait()

    # ---------------------------------------------------------------------------------------------------------- results

    def _write(self) -> None:
        """sweep.csv and sweep.png, as far as runs are complete; another grid's stay until one of this has begun."""
        rows = [run.result() for run in self.runs]
        if all(row["status"] == NOT_STARTED for row in rows):
            return

        def write(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.folder / "sweep.csv", write)
        complete = [
            (run.name, row)
            for run, row in zip(self.runs, rows, strict=True)
            if row["status"] == Status.COMPLETED and row[REWARD_ACCURACY] is not None
        ]
        if complete:
            plot_settings(complete, self.folder / "sweep.png", f"{len(complete)} of {len(self.runs)} settings")

    def _report(self) -> int:
        """The table, best first; 1 if a run failed."""
        results = sorted((run.result() for run in self.runs), key=_rank)
        names = list(self.runs[0].setting)
        table = Table(title=f"Sweep {self.folder}: held-out pairs", title_justify="left")
        for name in [*names, "reward accuracy", "margin", "loss", "status"]:
            table.add_column(name, justify="right" if name in ("reward accuracy", "margin", "loss") else "left")
        for row in results:
            figures = zip(FIGURES, (".1%", ".4f", ".4f"), strict=True)
            shown = ["" if row[name] is None else format(row[name], form) for name, form in figures]
            table.add_row(*(row[name] for name in names), *shown, row["status"])
        self.console.print(table)
        best = results[0]
        if best[REWARD_ACCURACY] is not None:
            self._say(f"Best: {setting_name({name: best[name] for name in names})}, in {best['folder']}")
            self._say(f"Table: {self.folder / 'sweep.csv'}; plot: {self.folder / 'sweep.png'}")
        failed = [run.name for run in self.runs if not run.done()]
        if failed:
            print(f"error: {len(failed)} of {len(self.runs)} runs failed: {'; '.join(failed)}", file=sys.stderr)
        return int(bool(failed))

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)


def _has_gpu() -> bool:
    import torch  # which takes seconds, for this question alone

    return torch.cuda.is_available()


def _rank(row: Mapping[str, Any]) -> tuple[float, float]:
    """Most accurate first, then the widest margin; what has no figures last."""
    accuracy, margin = row[REWARD_ACCURACY], row[REWARD_MARGIN]
    return (math.inf, math.inf) if accuracy is None else (-accuracy, -margin)
