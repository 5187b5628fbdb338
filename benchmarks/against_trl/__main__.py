"""`python benchmarks/against_trl`, see compare.py."""

from compare import main

try:
    raise SystemExit(main())
except KeyboardInterrupt:
    raise SystemExit("stopped; workloads that were done are in --out") from None
