#!/usr/bin/env bash
# Makes (or completes) the virtual environment .venv beside this folder and installs the project into it, with tested pins.
# Sourced by quickstart.sh and test.sh. Arguments: the extras to install, such as "[test]".
# PYTHON names the interpreter (default python3). Where there is no NVIDIA GPU, torch comes as its CPU build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lit_puzzle needs Python 3.11 or newer; set PYTHON to one (found: $("$python" --version))" >&2
    exit 2
}
if [ ! -x .venv/bin/python ]; then
    echo "Installing into .venv: 1.7 GB and some minutes (several GB more where there is a GPU)" >&2
    "$python" -m venv .venv
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)

torch_pin="$(grep '^torch==' constraints.txt)"
if ! .venv/bin/python -c "from importlib.metadata import version; assert version('torch').split('+')[0] == '${torch_pin#torch==}'" 2>/dev/null; then
    cpu_index=https://download.pytorch.org/whl/cpu
    reachable="import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=10)"
    if ! nvidia-smi -L >/dev/null 2>&1 && .venv/bin/python -c "$reachable" 2>/dev/null; then
        "${pip[@]}" "$torch_pin" --index-url "$cpu_index"
    else
        "${pip[@]}" "$torch_pin"
    fi
fi
"${pip[@]}" --editable ".$extras"
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
