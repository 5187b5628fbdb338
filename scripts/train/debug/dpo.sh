#!/usr/bin/env bash
# Preference optimisation, end to end, on whatever machine this is.
#
#   bash scripts/train/debug/dpo.sh [--field value ...]
#       The embedded default, offline, on 2 CPU cores in a minute or two: makes a small model and a task with checkable
#       answers, trains the model (loss_type sft), then on preferences, and compares both on held-out prompts.
#       Everything lies in output/quickstart, which the next such run replaces. SEED=7 draws another task and model.
#
#   MODEL=allenai/OLMo-2-0425-1B-SFT DATA=pairs.jsonl bash scripts/train/debug/dpo.sh [--field value ...]
#       A debug run of any local or Hub model and data on one GPU (or a CPU), with configs/debug/dpo.yaml. Every run
#       gets a new folder in output/debug.
#
# Flags are fields of the configuration (python dpo_tune_cache.py --help) and go to the preference stage.
# scripts/setup_env.sh says how Python and the packages are found; OPEN_PO_SKIP_INSTALL=1 installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' scripts/train/debug/dpo.sh
        exit
        ;;
    "" | --*) ;;
    *)
        echo "error: $1: only --field value pairs are taken; the model and data are MODEL=... and DATA=..." >&2
        exit 2
        ;;
esac
if [ "${MODEL:+given}" != "${DATA:+given}" ]; then
    echo "error: MODEL and DATA go together: MODEL=folder-or-Hub-name DATA=file-or-Hub-name bash $0" >&2
    exit 2
fi

source scripts/setup_env.sh

if [ -n "${MODEL:-}" ]; then
    python dpo_tune_cache.py configs/debug/dpo.yaml --model_name_or_path "$MODEL" --mixer_list "$DATA" 1.0 \
        --output_dir "output/debug/$(date +%Y%m%d-%H%M%S)" "$@"
    exit
fi

export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=output/quickstart/cache
# So small a model gains nothing from a second thread, and would wait for it whenever another program runs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
seed=${SEED:-42}
SECONDS=0
echo "== 1/4  Making a model and a task"
python -m open_po.quickstart build --seed "$seed" -- configs/quickstart/dpo.yaml --seed "$seed" "$@"
echo "== 2/4  Supervised fine-tuning (configs/quickstart/sft.yaml)"
python dpo_tune_cache.py configs/quickstart/sft.yaml --seed "$seed"
echo "== 3/4  Preference optimisation (configs/quickstart/dpo.yaml)"
python dpo_tune_cache.py configs/quickstart/dpo.yaml --seed "$seed" "$@"
echo "== 4/4  Greedy answers to held-out prompts, before and after"
python -m open_po.quickstart report
echo "All of it took $SECONDS seconds."
