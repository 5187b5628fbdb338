#!/usr/bin/env bash
# Everything that must hold before a change goes in: linter, formatter, type checker, tests.
#
#   bash scripts/test.sh [pytest arguments]           all tests but the slow ones and those for a GPU
#   bash scripts/test.sh --slow [pytest arguments]    the slow ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marked="not slow and not gpu"
if [ "${1:-}" = "--slow" ]; then
    marked="slow and not gpu"
    shift
fi

source scripts/setup_env.sh

step() {
    echo "== $*"
    "$@"
}
step python -m ruff check .
step python -m ruff format --check .
step python -m mypy
step python -m pytest -m "$marked" -n 2 "$@"
