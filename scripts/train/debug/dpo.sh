#!/usr/bin/env bash
# Preference optimisation, end to end, on whatever machine this is.
#
#   bash scripts/train/debug/dpo.sh [--field value ...]
#       The embedded default, offline, on 2 CPU cores in a minute or two: a small model and a task with checkable
#       answers are made, the model is trained (loss_type sft), then on preferences, and both are compared on held-out
#       prompts. That is the pipeline of model quickstart, task numbers and loss dpo_norm (scripts/train/pipeline.sh), in
#       output/quickstart. Started again it goes on where it was stopped; what would run with other settings begins
#       anew. SEED=7 draws another task and model.
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

if [ -n "${MODEL:-}" ]; then
    source scripts/setup_env.sh
    python dpo_tune_cache.py configs/debug/dpo.yaml --model_name_or_path "$MODEL" --mixer_list "$DATA" 1.0 \
        --output_dir "output/debug/$(date +%Y%m%d-%H%M%S)" "$@"
    exit
fi

export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=output/quickstart/cache
# So small a model gains nothing from a second thread, and would wait for it whenever another program runs; nor from a
# second GPU.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PROCESSES_PER_NODE=1
export SEED="${SEED:-42}"
exec bash scripts/train/pipeline.sh quickstart numbers dpo_norm --output_dir output/quickstart --restart \
    --seed "$SEED" --sft.seed "$SEED" "$@"
