"""COMET (Rei et al. 2022), run as the program that it comes with.

unbabel-comet 2.2 needs versions of transformers, huggingface_hub and numpy that are older than this project's, so it
lives in an environment of its own, and its `comet-score` is started as a process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from open_po.errors import UserError
from open_po.evaluation.metrics.spec import Answered, Tools

PROGRAM = "OPEN_PO_COMET"  # the environment variable that names comet-score
_XCOMET = "Unbabel/XCOMET-XL"
_BATCH = 16
_GET_IT = (
    "python -m venv comet && comet/bin/pip install unbabel-comet (it needs an environment of its own), then set "
    f"{PROGRAM}=comet/bin/comet-score"
)


def comet(answered: Answered) -> list[float]:
    """By `comet_model`, in percent."""
    return _score(answered, answered.tools.comet_model)


def xcomet(answered: Answered) -> list[float]:
    """By XCOMET-XL (Guerreiro et al. 2024), in percent."""
    return _score(answered, _XCOMET)


def lacks_program(tools: Tools) -> str | None:
    """A line if there is no comet-score, or the pattern for sources is none."""
    if tools.source_pattern is not None:
        try:
            if re.compile(tools.source_pattern).groups < 1:
                return f"--source_pattern {tools.source_pattern}: has no group; put the source in parentheses"
        except re.error as error:
            return f"--source_pattern {tools.source_pattern}: is no regular expression ({error})"
    named = os.environ.get(PROGRAM)
    if named is not None and shutil.which(named) is None:
        return f"{PROGRAM}: {named} is no program; {_GET_IT}"
    return None if _program() is not None else f"metrics: comet needs comet-score, which is not on PATH; {_GET_IT}"


def _program() -> str | None:
    return shutil.which(os.environ.get(PROGRAM, "comet-score"))


def _score(answered: Answered, model: str) -> list[float]:
    """Raises UserError if the program fails, or a prompt has no source."""
    program = _program()
    if program is None:
        raise UserError(str(lacks_program(answered.tools)))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.txt" for name in ("sources", "translations", "references")}
        texts = (_sources(answered), answered.answers, answered.references)
        for path, lines in zip(paths.values(), texts, strict=True):
            path.write_text("".join(" ".join(line.split()) + "\n" for line in lines), encoding="utf-8")
        out = Path(folder) / "scores.json"
        words = [program]
        for name, path in paths.items():
            words += [f"--{name}", str(path)]
        words += ["--model", model, "--gpus", "0" if answered.tools.device == "cpu" else "1"]
        words += ["--batch_size", str(_BATCH), "--quiet", "--only_system", "--to_json", str(out)]
        done = subprocess.run(words, capture_output=True, text=True, env=_environment())
        if done.returncode or not out.exists():
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise UserError(f"metrics: {program} with {model} has failed ({said}); answers are kept, try it by hand")
        (rows,) = json.loads(out.read_text(encoding="utf-8")).values()
    return [100.0 * row["COMET"] for row in rows]


def _environment() -> dict[str, str]:
    """Of this process, without what would give the program this environment's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _sources(answered: Answered) -> Sequence[str]:
    """What each prompt asks to translate."""
    pattern = answered.tools.source_pattern
    if pattern is None:
        answered.tools.say(
            "COMET takes the whole prompt for the source; where it holds instructions, give --source_pattern a regular "
            "expression whose first group is the source, as 'English: (.*)'"
        )
        return answered.prompts
    found = []
    for prompt in answered.prompts:
        match = re.search(pattern, prompt)
        if match is None:
            raise UserError(f"--source_pattern {pattern}: is nowhere in the prompt {prompt[:80]!r}; correct it")
        found.append(match[1])
    return found
