#!/usr/bin/env bash
# Installs the project with its test extras and runs everything that guards it: format, lint, types, tests.
# Arguments go to pytest: bash scripts/test.sh tests/test_spec.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[test]"
ruff format --check .
ruff check .
mypy
python -m pytest "$@"
