#!/usr/bin/env bash
# Start a run on one node or on several: the common end of every launch script.
#
#   bash scripts/train/launch.sh CONFIG.yaml [MORE.yaml ...] [--dry-run] [--restarts N] [--field value ...]
#
# One node needs nothing else: a process for each GPU, or one on a CPU. On several, run the same command on each with
#
#   NUM_NODES       nodes                                NODE_RANK       this one's number, from 0
#   MASTER_ADDR     node 0's address                     MASTER_PORT     a free port there (default 29500)
#   GPUS_PER_NODE   processes, one for each GPU (default: all GPUs); PROCESSES_PER_NODE on machines without
#
# or under Slurm, which says all of it: scripts/train/slurm.sbatch. --dry-run prints the commands of every node.
# The environment is made ready first (scripts/setup_env.sh), by one node at a time where they share this folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case "${1:-}" in
    "" | -h | --help)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' scripts/train/launch.sh
        exit
        ;;
esac

# Nodes that share this folder wait here for the one that installs, and then find everything ready. The lock is on a
# file that is there anyway; where the file system has none, or the folder is read-only, there is nothing to wait for.
{ exec 9<>setup.py && flock 9; } 2>/dev/null || true
source scripts/setup_env.sh
exec 9>&- # ends the lock

# In place of this shell, so that signals reach the launcher. `python` may be a function here.
exec "$(python -c 'import sys; print(sys.executable)')" -m open_po launch "$@"
