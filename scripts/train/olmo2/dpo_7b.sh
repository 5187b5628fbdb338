#!/usr/bin/env bash
# OLMo 2 7B: its DPO stage, as published, on 4 nodes with 8 GPUs each.
#
#   NODE_RANK=0 MASTER_ADDR=node0 bash scripts/train/olmo2/dpo_7b.sh [--dry-run] [--field value ...]     on node 0
#   NODE_RANK=1 MASTER_ADDR=node0 bash scripts/train/olmo2/dpo_7b.sh [--field value ...]                 on node 1; and so on
#   sbatch scripts/train/slurm.sbatch scripts/train/olmo2/dpo_7b.sh [--field value ...]                  on all, by Slurm
#
# It is configs/models/olmo-2-7b.yaml with tasks/olmo2.yaml and losses/dpo_norm.yaml. Metrics go to W&B and the
# model to the Hub (`wandb login`, `hf auth login`), or not: --with_tracking false --push_to_hub false.
#
# NUM_NODES and GPUS_PER_NODE, or Slurm, change the nodes; keep the global batch at 128 pairs then, for example on one
# node: NUM_NODES=1 bash scripts/train/olmo2/dpo_7b.sh --gradient_accumulation_steps 16
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    export NUM_NODES="${NUM_NODES:-4}"
    [ -n "${PROCESSES_PER_NODE:-}" ] || export GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" \
    configs/models/olmo-2-7b.yaml configs/tasks/olmo2.yaml configs/losses/dpo_norm.yaml \
    --exp_name olmo2_dpo_7b --parallel zero3 --with_tracking --push_to_hub "$@"
