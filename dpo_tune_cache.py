"""Train a causal language model on preference pairs with cached reference log-probs.

    python dpo_tune_cache.py CONFIG.yaml [MORE.yaml ...] [--field value ...]

`--help` lists every field.
"""

import sys

from open_po.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
