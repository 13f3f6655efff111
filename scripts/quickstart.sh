#!/usr/bin/env bash
# Sets everything up and runs the main job: RL recovery of the embedded pruned model. About ten minutes on one CPU core.
# With --all: every stage in its order (recipes/pipeline.yaml).
# Arguments are passed on: bash scripts/quickstart.sh --trainer.max_steps=4; bash scripts/quickstart.sh --all --plan
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""  # sourced without arguments it would see ours
if [ "${1:-}" = --all ]; then
    shift
    [ -x .venv-vllm/bin/python ] || echo "No .venv-vllm here: throughput is predicted and the serve check is left out" \
        "(bash scripts/vllm_env.sh makes it, before this)" >&2
    lightning run recipes/pipeline.yaml "$@"
elif [ -f runs/rl_recover/run.json ] && [ $# -eq 0 ]; then
    echo "runs/rl_recover is complete (run it anew with: bash scripts/quickstart.sh --overwrite):"
    python -m json.tool runs/rl_recover/run.json
else
    lightning run recipes/rl_recover.yaml "$@"
fi
