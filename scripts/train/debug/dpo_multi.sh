#!/usr/bin/env bash
# Preference optimisation by several processes, on whatever machines these are: the embedded quickstart, offline.
#
#   bash scripts/train/debug/dpo_multi.sh [--dry-run] [--field value ...]
#       Two processes on this machine's CPU, in a minute or two: makes a small model and a task, trains the model
#       (loss_type sft, one process), then on preferences with both processes, and compares the two.
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/train/debug/dpo_multi.sh [--field value ...]     on node 0
#   NUM_NODES=2 NODE_RANK=1 MASTER_ADDR=node0 bash scripts/train/debug/dpo_multi.sh [--field value ...]     on node 1
#       The same over two machines that share this folder. Node 0 makes the model; node 1's launcher waits for node 0's.
#       Machines that do not share it need a copy of output/quickstart: run `bash scripts/train/debug/dpo.sh` on one,
#       copy the folder to the others, and start all with PREPARED=1, which makes nothing.
#
# GPUS_PER_NODE=8 takes GPUs, PROCESSES_PER_NODE (default 2) processes on the CPU. A step has 32 pairs however many there
# are. Flags are fields of the configuration and go to the preference stage, for example --parallel zero2.
# Everything lies in output/quickstart, which the next such run replaces. SEED=7 draws another task and model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

dry=
for word in "$@"; do
    case "$word" in
        -h | --help)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' scripts/train/debug/dpo_multi.sh
            exit
            ;;
        --dry-run) dry=1 ;;
    esac
done

if [ -n "${GPUS_PER_NODE:-}" ]; then
    processes=$GPUS_PER_NODE
else
    export PROCESSES_PER_NODE="${PROCESSES_PER_NODE:-2}" CUDA_VISIBLE_DEVICES=
    processes=$PROCESSES_PER_NODE
fi
nodes=${NUM_NODES:-${SLURM_JOB_NUM_NODES:-1}} node=${NODE_RANK:-${SLURM_NODEID:-0}} seed=${SEED:-42}
case "$nodes$processes$node" in
    *[!0-9]*)
        echo "error: NUM_NODES $nodes, NODE_RANK $node, processes $processes: must be whole numbers" >&2
        exit 1
        ;;
esac
batch=$((32 / (nodes * processes)))
dpo=(configs/quickstart/dpo.yaml --seed "$seed" --per_device_train_batch_size "$((batch > 0 ? batch : 1))" "$@")

if [ -n "$dry" ]; then
    exec bash scripts/train/launch.sh "${dpo[@]}"
fi

source scripts/setup_env.sh
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=output/quickstart/cache
# So small a model gains nothing from a second thread, and would wait for it whenever another program runs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
SECONDS=0
if [ "$node" = 0 ] && [ -z "${PREPARED:-}" ]; then
    echo "== 1/4  Making a model and a task"
    python -m open_po.quickstart build --seed "$seed" -- "${dpo[@]}"
    echo "== 2/4  Supervised fine-tuning (configs/quickstart/sft.yaml)"
    python dpo_tune_cache.py configs/quickstart/sft.yaml --seed "$seed"
fi
# The other nodes' launchers wait for node 0's port, which opens when the model is there.
echo "== 3/4  Preference optimisation (configs/quickstart/dpo.yaml), $((nodes * processes)) processes"
bash scripts/train/launch.sh "${dpo[@]}"
if [ "$node" = 0 ]; then
    echo "== 4/4  Greedy answers to held-out prompts, before and after"
    python -m open_po.quickstart report
    echo "All of it took $SECONDS seconds."
fi
