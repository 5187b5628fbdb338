"""`python benchmarks/against_trl`, see compare.py."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))  # workloads, matmul_rate

from compare import main

try:
    raise SystemExit(main())
except KeyboardInterrupt:
    raise SystemExit("stopped; workloads that were done are in --out") from None
