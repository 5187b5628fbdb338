"""The embedded default: a model, a tokenizer and a preference task small enough for two CPU cores, made from nothing.

The task is to write a number in words: `47063 in words:` wants `forty seven thousand sixty three`. The SFT corpus has
one systematic flaw: where the last two digits make a compound, two times out of three their words are swapped (`...
thirty six`). A model trained on it learns the task and the flaw, so its greedy answers are wrong for just these
numbers. The preference pairs hold the right answer against that mistake, or another plausible one where the last two
digits make no compound. No number occurs in more than one of the three files.

    python -m open_po.quickstart build  --dir output/quickstart [--seed 42]
    python -m open_po.quickstart report --dir output/quickstart

`scripts/train/debug/dpo.sh` runs the whole: build, the two training stages of configs/quickstart/, report.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from open_po.command import CommandParser, refused
from open_po.config import load_config
from open_po.errors import ConfigError, UserError
from open_po.evaluate import exact_match
from open_po.output import write_atomically
from open_po.runtime import Runtime

# fmt: off
UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
NUMBERS = range(1000, 100_000)
SFT_ROWS, PREFERENCE_ROWS, HELD_OUT_ROWS = 16_000, 8_000, 500
FLAW_RATE = 2 / 3  # share of the compounds that the SFT corpus gets wrong
MAX_ANSWER_TOKENS = 12

# Names in the quickstart's folder: what is made here, and what the trainer writes where configs/quickstart/ says.
_MARKER = ".open_po_quickstart"
_PARTS = ("data", "base", "sft", "dpo", "reference", "cache")
_REPORT = "report.json"


# -------------------------------------------------------------------------------------------------------------- task


def number_words(number: int) -> str:
    """The English words of a number from 1 to 999,999, without hyphens and `and`. Raises ValueError."""
    if not 0 < number < 1_000_000:
        raise ValueError(f"{number} does not lie in 1..999999")
    thousands, rest = divmod(number, 1000)
    words = [*_below_thousand(thousands), "thousand"] if thousands else []
    return " ".join(words + _below_thousand(rest))


def _below_thousand(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    words = [UNITS[hundreds], "hundred"] if hundreds else []
    if 0 < rest < 20:
        return [*words, UNITS[rest]]
    tens, ones = divmod(rest, 10)
    return words + ([TENS[tens]] if tens else []) + ([UNITS[ones]] if ones else [])


def swapped_compound(number: int) -> str | None:
    """The answer with the last two digits read the wrong way round, as in 47 `seventy four`: the corpus's flaw.

    None if they make no compound whose swap is one too: a digit is below two, or both are the same.
    """
    tens, ones = divmod(number % 100, 10)
    if tens < 2 or ones < 2 or tens == ones:
        return None
    return number_words(number - number % 100 + 10 * ones + tens)


def teen_for_ty(number: int, rng: random.Random) -> str | None:
    """The answer with one `thirteen` for `thirty` or the other way round; None if it has no such word."""
    twins = dict(zip(UNITS[13:], TENS[3:], strict=True))
    twins |= {ty: teen for teen, ty in twins.items()}
    words = number_words(number).split()
    places = [place for place, word in enumerate(words) if word in twins]
    if not places:
        return None
    place = rng.choice(places)
    return " ".join([*words[:place], twins[words[place]], *words[place + 1 :]])


def left_out_word(number: int, rng: random.Random) -> str | None:
    """The answer without one of its words; None if it has only one."""
    words = number_words(number).split()
    place = rng.randrange(len(words))
    return " ".join(words[:place] + words[place + 1 :]) or None


def misread_digit(number: int, rng: random.Random) -> str:
    """The answer to a number of as many digits that differs in one digit."""
    digits = list(str(number))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "123456789" if d != digits[place]])
    return number_words(int("".join(digits)))


def plausible_mistake(number: int, rng: random.Random) -> str:
    """A wrong answer: the corpus's flaw where it can occur, else one of the other mistakes."""
    swapped = swapped_compound(number)
    if swapped is not None:
        return swapped
    mistakes: list[Callable[[int, random.Random], str | None]] = [teen_for_ty, left_out_word, misread_digit]
    rng.shuffle(mistakes)
    return next(answer for mistake in mistakes if (answer := mistake(number, rng)) is not None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of preference data in layout `text`."""

    prompt: str
    chosen: str
    rejected: str


def _row(number: int, chosen: str, rejected: str) -> Row:
    return Row(prompt=f"{number} in words:", chosen=f" {chosen}", rejected=f" {rejected}")


def preference_row(number: int, rng: random.Random) -> Row:
    """The right answer against a mistake."""
    return _row(number, number_words(number), plausible_mistake(number, rng))


def sft_row(number: int, rng: random.Random) -> Row:
    """The corpus's answer, flawed or not, as chosen; `loss_type: sft` leaves rejected unread."""
    row, swapped = preference_row(number, rng), swapped_compound(number)
    flawed = swapped is not None and rng.random() < FLAW_RATE
    return Row(prompt=row.prompt, chosen=row.rejected, rejected=row.chosen) if flawed else row


def make_rows(seed: int) -> dict[str, list[Row]]:
    """The rows of the files `sft`, `preferences` and `held_out`; no number occurs twice."""
    rng = random.Random(seed)
    numbers = iter(rng.sample(NUMBERS, SFT_ROWS + PREFERENCE_ROWS + HELD_OUT_ROWS))
    plan = {
        "sft": (SFT_ROWS, sft_row),
        "preferences": (PREFERENCE_ROWS, preference_row),
        "held_out": (HELD_OUT_ROWS, preference_row),
    }
    return {name: [make(next(numbers), rng) for _ in range(count)] for name, (count, make) in plan.items()}


# --------------------------------------------------------------------------------------------------------- the model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit and per word of the task; text from ids has the words separated by single blanks."""
    words = ["<pad>", "<unk>", "</s>", *"0123456789", "in", "words", ":", *UNITS, *TENS[2:], "hundred", "thousand"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with 0.3 million random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


# ------------------------------------------------------------------------------------------------------------- build


def build(folder: Path, seed: int) -> None:
    """Write `data/*.jsonl` and the untrained model `base` into `folder`, after removing an earlier quickstart from it.

    Raises UserError, with nothing changed, if the folder holds anything but a quickstart.
    """
    _claim(folder)
    (folder / "data").mkdir()
    for name, rows in make_rows(seed).items():
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def _claim(folder: Path) -> None:
    """Make the folder this quickstart's: only what a quickstart names is removed, and only beside its marker."""
    marker = folder / _MARKER
    if folder.exists() and not marker.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something else than an earlier quickstart; move it away or choose --dir")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in _PARTS:
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    (folder / _REPORT).unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True, kw_only=True)
class Change:
    """A share, 0 to 1, before and after the preference stage."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the preference stage did on the held-out prompts."""

    prompts: int
    exact_match: Change  # greedy answers
    reward_accuracy: Change  # share of pairs whose chosen response has the higher reward, ties counted half


def measure(folder: Path, device: torch.device) -> Report:
    """Evaluate both stages' models on `device`. Raises UserError if a stage has not been run to its end."""
    summaries = {stage: _summary(folder / stage) for stage in ("sft", "dpo")}
    before, after = summaries["dpo"]["eval_before"], summaries["dpo"]["eval"]
    if after is None:
        raise UserError(f"{folder / 'dpo'}: the run had no held-out data; leave eval_mixer_list as it is")
    rows = read_rows(folder / "data" / "held_out.jsonl")
    return Report(
        prompts=len(rows),
        exact_match=Change(
            before=_exact_match(folder / "sft", rows, device), after=_exact_match(folder / "dpo", rows, device)
        ),
        reward_accuracy=Change(before=before["rewards/accuracy"], after=after["rewards/accuracy"]),
    )


def _summary(run: Path) -> dict[str, Any]:
    path = run / "run_summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if summary.get("status") != "completed":
        raise UserError(f"{run}: holds no completed run; `bash scripts/train/debug/dpo.sh` runs all stages")
    return summary


def _exact_match(run: Path, rows: Sequence[Row], device: torch.device) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    prompts, answers = [row.prompt for row in rows], [row.chosen for row in rows]
    return exact_match(model.to(device), tokenizer, prompts, answers, max_new_tokens=MAX_ANSWER_TOKENS)


def report_table(report: Report) -> Table:
    """The report for the console."""
    table = Table(
        title=f"Quickstart: {report.prompts} held-out numbers into words",
        title_justify="left",
        caption="Reward accuracy starts at one half: a policy that still is its reference prefers neither answer.",
        caption_justify="left",
    )
    table.add_column("", style="bold", overflow="fold")
    table.add_column("before (SFT)", justify="right")
    table.add_column("after (preferences)", justify="right")
    table.add_column("change", justify="right")
    for label, change in (("exact match", report.exact_match), ("reward accuracy", report.reward_accuracy)):
        points = 100 * (change.after - change.before)
        table.add_row(label, f"{change.before:.1%}", f"{change.after:.1%}", f"{points:+.1f} points")
    return table


def tell(report: Report, folder: Path, console: Console) -> None:
    """Write the report to `report.json`, and print it with the paths of what to look at next."""
    write_atomically(folder / _REPORT, lambda path: path.write_text(json.dumps(asdict(report), indent=2) + "\n"))
    console.print(report_table(report))
    for label, path in (("curves", folder / "dpo" / "training_curves.png"), ("model", folder / "dpo")):
        console.print(f"{label}: {path}", soft_wrap=True, markup=False)


# ----------------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit code. What a user can cause is told in one line."""
    parser = CommandParser(prog="python -m open_po.quickstart", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("build", "make the data and the untrained model"), ("report", "compare the two stages")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--dir", type=Path, default=Path("output/quickstart"), help="default %(default)s")
        if name == "build":
            command.add_argument("--seed", type=int, default=42, help="of the rows and weights; default %(default)s")
            then = "a configuration for later: nothing is made if it has a mistake"
            command.add_argument("then", nargs="*", metavar="-- CONFIG.yaml --field value ...", help=then)
    options = parser.parse_args(arguments)
    try:
        if options.command == "build" and options.then:
            load_config(options.then)
    except ConfigError as error:
        return refused(error)
    runtime = Runtime.start(seed=0)
    try:
        if options.command == "build":
            build(options.dir, options.seed)
            runtime.say(f"Quickstart: made data and an untrained model in {options.dir}")
        else:
            tell(measure(options.dir, runtime.device), options.dir, runtime.console)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or options.dir}: {error.strerror or error}", file=sys.stderr)
        return 1
    finally:
        runtime.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
