"""`python -m open_po COMMAND`: what there is to do besides training.

    cache    build, info, verify, prune, merge: the reference log-probs on disk
    score    log-probs and implicit rewards of every pair of a data set
    sweep    one reference pass, then a run for each setting of a grid
    upload   to the Hugging Face Hub, what a run has not got there itself
    launch   a run's processes, on one node or on several at once

`python -m open_po COMMAND --help` says more; training is `python dpo_tune_cache.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(words: Sequence[str]) -> int:
    """Run a command; returns the exit code. Importing takes seconds, in which Ctrl-C must be as quiet as later."""
    try:
        name, *rest = words or ("--help",)
        if name == "cache":
            from open_po.commands import cache

            return cache.main(rest)
        if name == "score":
            from open_po.commands import score

            return score.main(rest)
        if name == "sweep":
            from open_po.commands import sweep

            return sweep.main(rest)
        if name == "upload":
            from open_po.commands import upload

            return upload.main(rest)
        if name == "launch":
            # Read when torch is imported. A store that closes is told of in one line, not in a C++ trace as well.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
            from open_po.commands import launch

            return launch.main(rest)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    print(f"error: {name}: is no command; there are cache, score, sweep, upload and launch", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
