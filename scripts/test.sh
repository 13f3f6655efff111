#!/usr/bin/env bash
# Installs the project with its test extras and runs everything that guards it: format, lint, types, tests.
#   bash scripts/test.sh                        everything; makes vLLM's environment too (3.4 GB, a few minutes once)
#   bash scripts/test.sh --fast                 before a commit: leaves out the tests marked `slow` or `vllm`
#   bash scripts/test.sh tests/test_spec.py     arguments go to pytest
# Two processes share the tests, a file is never split; with arguments for pytest it is one process. WITHOUT_VLLM=1 leaves
# vLLM's environment out: its tests are skipped, and listed as such, where there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[test]"
selected=()
if [ "${1:-}" = --fast ]; then
    selected=(-m "not slow and not vllm")
    shift
fi
ruff format --check .
ruff check .
mypy
if [ ${#selected[@]} -eq 0 ] && [ $# -eq 0 ] && [ -z "${WITHOUT_VLLM:-}" ]; then
    bash scripts/vllm_env.sh || echo "vLLM has no environment here; its tests are skipped" >&2
fi
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
python -m pytest -rs "${selected[@]}" "$@"
