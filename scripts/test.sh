#!/usr/bin/env bash
# Installs the project with its test extras and runs everything that guards it: format, lint, types, tests.
# Arguments go to pytest: bash scripts/test.sh tests/test_spec.py
# Without arguments vLLM gets an environment too (3.4 GB, a few minutes once; WITHOUT_VLLM=1 leaves it out): its tests
# are skipped, and listed as such, where there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[test]"
ruff format --check .
ruff check .
mypy
if [ $# -eq 0 ] && [ -z "${WITHOUT_VLLM:-}" ]; then
    bash scripts/vllm_env.sh || echo "vLLM has no environment here; its tests are skipped" >&2
fi
python -m pytest -rs "$@"
