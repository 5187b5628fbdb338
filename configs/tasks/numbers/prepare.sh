#!/usr/bin/env bash
# The rows of task numbers and the untrained model of the quickstart, in output/quickstart. Nothing if they are there.
#
#   SEED=7 bash configs/tasks/numbers/prepare.sh      other rows and weights (default 42)
set -euo pipefail
exec "${PYTHON:-python}" -m open_po.quickstart build --seed "${SEED:-42}"
