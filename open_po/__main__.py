"""`python -m open_po COMMAND`: what there is to do besides training."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from open_po.commands.command_line import end, show

# A module in `open_po/commands/` each, with a `main` that takes the words behind the command.
COMMANDS = {
    "cache": "build, info, verify, prune, merge: the reference log-probs on disk",
    "plan": "the memory that a run takes, what fits, what to change; needs no GPU and no weights",
    "inspect": "what the model will really see: tokens, lengths, what is left out, packs",
    "score": "log-probs and implicit rewards of every pair of a data set",
    "evaluate": "answers of models to held-out prompts, and how good they are: BLEU, ROUGE, exact match, ...",
    "sweep": "one reference pass, then a run for each setting of a grid",
    "pipeline": "SFT, preferences with one loss or several, evaluation: one command that goes on where it was stopped",
    "watch": "a run or a sweep while it goes on, seen from another terminal",
    "report": "one HTML page about runs and sweeps: curves, figures, settings that differ, samples",
    "upload": "to the Hugging Face Hub, what a run has not got there by itself",
    "launch": "a run's processes, on one node or on several at once",
}


def help_text() -> str:
    """What `--help` prints."""
    commands = "\n".join(f"    {name:<9}{text}" for name, text in COMMANDS.items())
    more = "`python -m open_po COMMAND --help` says more; training is `python dpo_tune_cache.py`."
    return f"{__doc__}\n\n{commands}\n\n{more}"


def main(words: Sequence[str]) -> int:
    """Run a command; returns the exit code. Importing takes seconds, in which Ctrl-C must be as quiet as later."""
    name, *rest = words or ("--help",)
    if name in ("-h", "--help"):
        show(help_text())
        return 0
    if name not in COMMANDS:
        *names, last = COMMANDS
        print(f"error: {name}: is no command; there are {', '.join(names)} and {last}", file=sys.stderr)
        return 2
    if name == "launch":  # read when torch is imported: a closing store is told in one line, not in a C++ trace as well
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        return int(import_module(f"open_po.commands.{name}").main(rest))
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    end(main(sys.argv[1:]))
