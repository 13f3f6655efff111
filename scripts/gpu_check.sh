#!/usr/bin/env bash
# What only a GPU can tell, in at most 8 minutes on one card, from the checkout, with nothing installed:
#   bash scripts/gpu_check.sh                             all parts
#   bash scripts/gpu_check.sh --parts attention layer     some of them
#   bash scripts/gpu_check.sh --device cpu --small        the same code at small size, without a GPU
# Needs Python >= 3.11 with torch >= 2.11 and transformers >= 5.17; what a part needs beyond them and is not there makes it
# skipped, by name. PYTHON names the interpreter, VLLM_PYTHON that of an environment with vLLM (default: .venv-vllm, or the
# same one). Every part is a process of its own with its own time limit. Writes gpu_check/report.json and one log for each
# part (--out names another folder), ends with a table, and exits with 1 if a part failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec "${PYTHON:-python3}" scripts/gpu_check/run_parts.py "$@"
