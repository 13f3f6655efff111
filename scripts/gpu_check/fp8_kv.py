"""FP8 KV cache in vLLM on this device: log-probabilities against the cache in bfloat16, and how many tokens fit.

The embedded tiny child (scales of 1, which its values do not need to be better) through
`lit_puzzle.serve.vllm.driver`, with an entry point of its own, so that nothing must be installed beside vLLM. The
interpreter is VLLM_PYTHON, that of .venv-vllm, or this one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from part import Options, Row, Skipped, run

ROOT = Path(__file__).parents[2]
ENTRY_POINT = "[vllm.general_plugins]\nlit_puzzle_checkout = lit_puzzle.serve.vllm.plugin:register\n"


def with_plugin(folder: Path) -> dict[str, str]:
    """Return variables with which all of vLLM's processes find this project and its plugin, without installing it."""
    found = folder / "plugin" / "lit_puzzle_checkout-0.dist-info"
    found.mkdir(parents=True, exist_ok=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: lit_puzzle_checkout\nVersion: 0\n")
    (found / "entry_points.txt").write_text(ENTRY_POINT)
    paths = [str(found.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def interpreter() -> Path:
    """Return the interpreter that has vLLM."""
    for python in (os.environ.get("VLLM_PYTHON"), ROOT / ".venv-vllm" / "bin" / "python", sys.executable):
        if python and Path(python).is_file():
            probe = subprocess.run([python, "-c", "import vllm"], capture_output=True, check=False)
            if probe.returncode == 0:
                return Path(python)
    raise Skipped("vllm is not installed (VLLM_PYTHON names an interpreter that has it)")


def work(options: Options) -> Iterator[Row]:
    """Run both engines on the same sequences."""
    python, folder = interpreter(), options.folder
    child = ROOT / "lit_puzzle" / "assets" / "tiny_child"
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(3, 100, (8, 100), generator=generator).tolist()
    settings = {"dtype": "bfloat16", "max_model_len": 128, "kv_cache_memory_bytes": 2**28}
    steps = [{"do": "score", "sequences": sequences}, {"do": "capacity"}]
    formats = ("auto", "fp8")
    job = [{"model": str(child), "settings": settings | {"kv_cache_dtype": kind}, "steps": steps} for kind in formats]
    (folder / "job.json").write_text(json.dumps(job))
    files = [str(folder / name) for name in ("job.json", "results.json")]
    environment = os.environ | with_plugin(folder) | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})
    subprocess.run([str(python), "-m", "lit_puzzle.serve.vllm.driver", *files], check=True, env=environment)
    results = json.loads((folder / "results.json").read_text())
    (exact, exact_room), (rounded, room) = results
    before, after = torch.tensor(exact), torch.tensor(rounded)
    error, ratio = float((before - after).abs().mean()), room["tokens"] / exact_room["tokens"]
    yield {"vllm": room["version"], "tokens bf16": exact_room["tokens"], "tokens fp8": room["tokens"]} | {
        "mean |gap of log-probability|": round(error, 4),
        "mean |log-probability|": round(float(before.abs().mean()), 4),
        "ok": 0 < error < 0.1 * float(before.abs().mean()) and 1.9 < ratio < 2.1,
    }


if __name__ == "__main__":
    run(work)
