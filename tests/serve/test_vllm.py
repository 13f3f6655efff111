"""A real vLLM serves what transformers computes.

Needs an environment made by scripts/vllm_env.sh; see `helpers.vllm_environment`.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import MIXED, UNIFORM, made_up_scales, make_child
from helpers.vllm_environment import NEEDS_VLLM, PYTHON, ROOT
from helpers.vllm_folders import write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_puzzle.serve.export import export
from lit_puzzle.serve.settings import Storage
from lit_puzzle.serve.vllm.check import require_vllm, run_engines, serve_check
from lit_puzzle.serve.vllm.check_reference import make_reference
from lit_puzzle.serve.vllm.report import difference
from lit_puzzle.serve.vllm.settings import CheckPrompts, VLLMSettings

SHORT = CheckPrompts(4, 64, 32)
SMALL = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": 2**26}
CONTROLS = {"control_experts", "control_window"}
CHECKS = {"greedy_tokens", "log_probabilities", "reload", "stop_tokens", "kv_tokens", "kv_allocation"} | CONTROLS
SERVER_CHECKS = {"server_completions", "server_streams", "server_stops", "server_refuses"}
pytestmark = NEEDS_VLLM


def outcomes(run_dir: Path) -> dict[str, str]:
    report = json.loads((run_dir / "report.json").read_text())
    return {check["name"]: check["outcome"] for check in report["checks"]}


def test_a_child_with_kv_scales_is_served_as_transformers_computes(tmp_path: Path) -> None:
    """Different experts and windows in the layers; engines, negative controls, and `vllm serve`."""
    source = make_child(tmp_path, MIXED)
    made_up_scales(source).save(tmp_path / "scales")
    export(tmp_path / "export", source, kv_scales=tmp_path / "scales")
    results = serve_check(tmp_path, tmp_path / "export" / "model", VLLMSettings(PYTHON), SHORT)
    assert outcomes(tmp_path) == dict.fromkeys(CHECKS | SERVER_CHECKS | {"control_scales"}, "passed")
    assert results["greedy_tokens/equal"] == 4 * 32 and results["kv_tokens/ratio"] == 2
    assert results["log_probabilities/difference"] < 1e-4 < results["control_window/difference"]
    assert results["stop_tokens/stop_tokens"] == 3  # <|return|>, <|call|>, <|endoftext|>


def test_mxfp4_experts_are_served_as_transformers_computes(tmp_path: Path) -> None:
    """Layers of 4, 8, 1 and 6 experts: one has fewer than top-k."""
    export(tmp_path / "export", write_folder(tmp_path / "packed", mxfp4=True))
    serve_check(tmp_path, tmp_path / "export" / "model", VLLMSettings(PYTHON, server=False), SHORT)
    skipped = dict.fromkeys(("control_scales", "server"), "skipped")
    assert outcomes(tmp_path) == dict.fromkeys(CHECKS, "passed") | skipped


def test_stock_and_masked_exports_are_served_without_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both against transformers on the child itself; vLLM's gpt-oss has windows on even layers."""
    mixed = [(kept, None if layer % 2 else 16) for layer, (kept, _) in enumerate(MIXED)]
    monkeypatch.setenv("VLLM_PLUGINS", "")
    engines, references = [], []
    for form, blocks in (("stock", UNIFORM), ("masked", mixed)):
        (tmp_path / form).mkdir()
        source = make_child(tmp_path / form, blocks)
        export(tmp_path / form / "run", source, storage=Storage(format=form))  # type: ignore[arg-type]
        reference = make_reference(source, "float32", CheckPrompts(3, 48, 16), seed=0)
        steps = [{"do": "greedy", "prompts": reference.prompts, "tokens": 16}]
        steps.append({"do": "score", "sequences": reference.sequences})
        engines.append({"model": str(tmp_path / form / "run" / "model"), "settings": SMALL, "steps": steps})
        references.append(reference)
    for reference, (completions, logprobs) in zip(references, run_engines(tmp_path, PYTHON, engines), strict=True):
        assert completions == reference.completions
        assert difference(logprobs, reference.logprobs)[0] < 1e-4


def test_tensor_parallel_equals_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    folder = write_folder(tmp_path / "folder", scales=True, intermediate_size=64)
    reference = make_reference(folder, "float32", CheckPrompts(2, 48, 8), seed=0)
    step = {"do": "score", "sequences": reference.sequences}
    settings = SMALL | {"tensor_parallel_size": 2}
    ((logprobs,),) = run_engines(tmp_path, PYTHON, [{"model": str(folder), "settings": settings, "steps": [step]}])
    assert difference(logprobs, reference.logprobs)[0] < 1e-4


def changed(folder: Path, source: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a folder with other tensors."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = {
    "unknown": (lambda t: t.update({"model.extra": torch.ones(1)}), {}, "Unknown tensor model.extra of shape (1,)"),
    "missing": (
        lambda t: t.pop("model.norm.weight"),
        {},
        "1 tensors of the checkpoint are missing, the first model.norm",
    ),
    "shape": (
        lambda t: t.update({"model.layers.2.mlp.router.bias": torch.ones(2)}),
        {},
        "model.layers.2.mlp.router.bias has shape (2,); the configuration implies (1,)",
    ),
    "half a scale": (
        lambda t: t.pop("model.layers.1.self_attn.v_scale"),
        {},
        "1 tensors of the checkpoint are missing, the first model.layers.1.self_attn.v_scale",
    ),
    "zero scale": (
        lambda t: t.update({"model.layers.1.self_attn.v_scale": torch.zeros(())}),
        {},
        "model.layers.1.self_attn.v_scale is 0.0: a KV scale is a finite number above 0",
    ),
    "layer without scales": (
        lambda t: [t.pop(f"model.layers.1.self_attn.{kind}_scale") for kind in "kv"],
        {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
        "none for layers [1], whose values would saturate at 448",
    ),
}


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "whole", scales=True)
    engines: list[tuple[str, dict[str, Any]]] = []
    for name, (change, settings, _) in REFUSED.items():
        engines.append((str(changed(tmp_path / name, whole, change)), SMALL | settings))
    other = write_folder(tmp_path / "other", swiglu_limit=6.0)
    engines.append((str(other), SMALL))
    script = ROOT / "tests" / "helpers" / "vllm_refusals.py"
    words = [
        str(require_vllm(PYTHON)),
        str(script),
        json.dumps(engines),
        json.dumps([[str(whole), 2], [str(whole), 1]]),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *errors, swiglu, uneven, even = json.loads(done.stdout.splitlines()[-1])
    for (name, (_, _, message)), found in zip(REFUSED.items(), errors, strict=True):
        assert message in found, (name, found)
    assert "swiglu_limit is 6.0; vLLM's gpt-oss always computes with 7.0" in swiglu
    assert "layer -> experts: {2: 1}" in uneven and even == ""
