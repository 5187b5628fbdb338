"""Train a causal language model on preference pairs with cached reference log-probs.

    python dpo_tune_cache.py CONFIG.yaml [MORE.yaml ...] [--field value ...]

`--help` lists every field, `--dry-run` prints the configuration and starts nothing.
"""

import sys


def start() -> int:
    """Run the command line; importing takes seconds, in which Ctrl-C must be as quiet as later."""
    try:
        from open_po.commands.command_line import end
        from open_po.commands.train import main

        end(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("error: interrupted; nothing had begun", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(start())
