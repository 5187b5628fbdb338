#!/usr/bin/env bash
# Preference optimisation by several processes, on whatever machines these are: the embedded quickstart, offline.
#
#   bash scripts/train/debug/dpo_multi.sh [--dry-run] [--field value ...]
#       Two processes on this machine's CPU, in a minute or two: makes a small model and a task, trains the model
#       (loss_type sft), then on preferences, both stages with both processes, and compares the two.
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/train/debug/dpo_multi.sh [--field value ...]     on node 0
#   NUM_NODES=2 NODE_RANK=1 MASTER_ADDR=node0 bash scripts/train/debug/dpo_multi.sh [--field value ...]     on node 1
#       The same over two machines that share this folder. Node 0 makes the model and compares; node 1's launcher waits
#       for node 0's.
#
# GPUS_PER_NODE=8 takes GPUs, PROCESSES_PER_NODE (default 2) processes on the CPU. A step has 32 pairs (64 rows of SFT)
# however many there are. Flags are fields of the configuration and go to the preference stage, for example
# --parallel zero2. Everything lies in output/quickstart_multi, and in output/quickstart the task and the untrained
# model; started again it goes on where it was stopped. SEED=7 draws another task and model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' scripts/train/debug/dpo_multi.sh
        exit
        ;;
esac

if [ -n "${GPUS_PER_NODE:-}" ]; then
    processes=$GPUS_PER_NODE
else
    export PROCESSES_PER_NODE="${PROCESSES_PER_NODE:-2}" CUDA_VISIBLE_DEVICES=
    processes=$PROCESSES_PER_NODE
fi
nodes=${NUM_NODES:-${SLURM_JOB_NUM_NODES:-1}}
case "$nodes$processes" in
    *[!0-9]*)
        echo "error: NUM_NODES $nodes, processes $processes: must be whole numbers" >&2
        exit 1
        ;;
esac
ranks=$((nodes * processes))
share() { # of $1 rows, at least one
    echo $(($1 / ranks > 0 ? $1 / ranks : 1))
}

export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=output/quickstart/cache
# So small a model gains nothing from a second thread, and would wait for it whenever another program runs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export SEED="${SEED:-42}"
exec bash scripts/train/pipeline.sh quickstart numbers dpo_norm --output_dir output/quickstart_multi --restart \
    --seed "$SEED" --per_device_train_batch_size "$(share 32)" \
    --sft.seed "$SEED" --sft.per_device_train_batch_size "$(share 64)" "$@"
