#!/usr/bin/env bash
# SFT, preference training from it, and evaluation, as one command that goes on where it was stopped.
#
#   bash scripts/train/pipeline.sh MODEL TASK LOSS [LOSS ...] [--dry-run] [--field value ...]
#
#   bash scripts/train/pipeline.sh quickstart numbers dpo dpo_gamma slic_dpo simpo    offline, on 2 CPU cores
#   bash scripts/train/pipeline.sh gemma-2-2b sum dpo_gamma --learning_rate 1e-7
#   sbatch --nodes=2 scripts/train/slurm.sbatch scripts/train/pipeline.sh MODEL TASK LOSS
#
# MODEL, TASK and LOSS name overlays in configs/models, configs/tasks and configs/losses, or are YAML files; several
# losses share the SFT stage and its reference log-probs, and one table compares them. Everything lies in
# output/MODEL_TASK. `python -m open_po pipeline --help` says the rest, and of several GPUs and nodes.
# scripts/setup_env.sh says how Python and the packages are found; OPEN_PO_SKIP_INSTALL=1 installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case "${1:-}" in
    "" | -h | --help)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' scripts/train/pipeline.sh
        exit
        ;;
esac

# Nodes that share this folder wait here for the one that installs, as in launch.sh.
{ exec 9<>setup.py && flock 9; } 2>/dev/null || true
source scripts/setup_env.sh
exec 9>&- # ends the lock

# In place of this shell, so that signals reach the pipeline. `python` may be a function here.
exec "$(python -c 'import sys; print(sys.executable)')" -m open_po pipeline "$@"
