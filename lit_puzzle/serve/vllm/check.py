"""Check that vLLM serves a checkpoint folder as transformers computes it; to be run before a model is deployed.

Reads a checkpoint folder (stock, assembled, distilled, recovered or exported) and runs a real vLLM in an environment of
its own. Writes report.json (outcome, reason and metrics of every check) and, during the run, job.json, results.json,
vllm.log and server.log.

Checks: greedy tokens and log-probabilities against transformers; a reload of weights into a running engine; stop
tokens; an FP8 KV cache; predicted against actual capacity of the KV cache; the OpenAI-compatible server. Negative
controls show that the comparison would notice an error: a window that is off by one, experts of one layer permuted
without their router, dropped KV scales.

Memory, one after the other: transformers, 4 bytes for each parameter (2 in bfloat16 with a tolerance of your own);
vLLM, 4 or 2 + kv_cache_gib; the server, the same again. Disk: a few hundred KiB. Traffic: these files, and local HTTP.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import is_child
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import claim_inputs
from lit_puzzle.serve.vllm.check_reference import Reference, make_reference, permuted_layer
from lit_puzzle.serve.vllm.check_server import check_server, serving
from lit_puzzle.serve.vllm.comparisons import compare, compare_allocation
from lit_puzzle.serve.vllm.report import skipped, write_report
from lit_puzzle.serve.vllm.settings import CheckPrompts, VLLMSettings

PROBE = """
import importlib.util, sys, importlib.metadata as m
found = [p.value for p in m.entry_points(group="vllm.general_plugins") if p.name == "lit_puzzle"]
sys.exit(not (importlib.util.find_spec("vllm") and found))
"""


def serve_check(
    run_dir: Path,
    checkpoint: Path,
    vllm: VLLMSettings = VLLMSettings(),  # noqa: B008  (frozen)
    prompts: CheckPrompts = CheckPrompts(),  # noqa: B008  (frozen)
    tolerance: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Check a folder in vLLM.

    Args:
        run_dir: run folder of this stage, which gets report.json.
        checkpoint: folder to be served.
        vllm: environment and engines of vLLM.
        prompts: prompts that are continued and scored.
        tolerance: allowed difference of log-probabilities; None: a multiple of what rounding alone changes in
            transformers, which is measured: of the largest in float32; of the mean in bfloat16, which needs the model
            in float32.
        seed: seed of the prompts.

    Returns:
        Numbers of checks `passed`, `failed` and `skipped`, and `<check>/<metric>` of every check.

    Raises:
        ValueError: vLLM is missing, the tolerance is not positive, an engine does not start, or a check failed (after
            report.json is written).
    """
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance} was given; it must be positive and finite, or null.")
    python = require_vllm(vllm.python)
    checkpoint = require_input(checkpoint, "checkpoint", "config.json").resolve()
    opened = Checkpoint(checkpoint)
    claim_inputs(run_dir, {"checkpoint": checkpoint_identity(opened)})
    exact = vllm.dtype == "float32"
    reference = make_reference(checkpoint, vllm.dtype, prompts, seed, tolerance is None)
    length = max(len(ids) for ids in (*reference.sequences, *reference.chats.values())) + prompts.new_tokens + 1
    cache_bytes = int(vllm.kv_cache_gib * 2**30)
    settings = {"dtype": vllm.dtype, "max_model_len": length, "kv_cache_memory_bytes": cache_bytes}
    engines = plan_engines(opened, reference, settings, prompts.tokens)
    results = dict(zip(engines, run_engines(run_dir, python, list(engines.values())), strict=True))
    checks = compare(reference, results, exact, tolerance, is_child(opened.config))
    token_bytes = 2 * int(opened.config["num_key_value_heads"]) * int(opened.config["head_dim"])
    windows = [window for _, window in opened.blocks]
    checks.append(compare_allocation(results["bfloat16"][0], windows, 2 * token_bytes, cache_bytes))
    without = why_no_server(opened, vllm, reference)
    if without is None:
        options = [f"--dtype={vllm.dtype}", f"--max-model-len={length}", "--enforce-eager"]
        options.append(f"--kv-cache-memory-bytes={cache_bytes}")
        with serving(python, checkpoint, options, run_dir / "server.log", vllm.server_seconds) as port:
            checks += check_server(port, prompts.question, reference, exact)
    else:
        checks.append(skipped("server", without))
    metrics = write_report(run_dir / "report.json", checks, {"vllm": results["main"][-1]["version"]})
    failed = [f"{check.name} ({check.reason})" for check in checks if check.outcome == "failed"]
    if failed:
        raise ValueError(f"vLLM does not serve {checkpoint} as transformers computes it: {'; '.join(failed)}.")
    return metrics


def why_no_server(checkpoint: Checkpoint, vllm: VLLMSettings, reference: Reference) -> str | None:
    """Return why the server is not checked; None if it is."""
    if not vllm.server:
        return "vllm.server: false"
    if not reference.chats:
        return "the folder has no chat template"
    vocab_size = int(checkpoint.config["vocab_size"])
    if not is_child(checkpoint.config) and vocab_size != checkpoint.family.vocab_size:
        return (
            f"vLLM renders chats of every stock {checkpoint.family.model_type} folder in the format of the released "
            f"models, with their vocabulary; this one has {vocab_size} tokens. Children keep their own chat template"
        )
    return None


def require_vllm(python: Path) -> Path:
    """Return the absolute path of an interpreter that has vLLM and this project's plugin.

    Raises:
        ValueError: it does not exist, or lacks one of them; names the script that makes the environment.
    """
    make = "Make one with: bash scripts/vllm_env.sh (its last line is the path for `vllm.python`)."
    if not python.is_file():
        raise ValueError(f"There is no interpreter {str(python)!r} of a vLLM environment. {make}")
    python = python.absolute()  # not resolved: the interpreter of a virtual environment is a link
    if subprocess.run([python, "-c", PROBE], capture_output=True, check=False).returncode:
        raise ValueError(f"{python} lacks vllm or the plugin of lit_puzzle. {make}")
    return python


def plan_engines(
    checkpoint: Checkpoint, reference: Reference, settings: dict[str, Any], prompt_tokens: int
) -> dict[str, dict[str, Any]]:
    """Return the engines to start, by name, with the steps of each for `lit_puzzle.serve.vllm.driver`.

    Args:
        checkpoint: checkpoint to be served.
        reference: completions and log-probabilities of transformers.
        settings: settings of `vllm.LLM` for the main engine.
        prompt_tokens: length of the random prompts.
    """
    folder = str(checkpoint.folder)
    score = {"do": "score", "sequences": reference.sequences}
    reload = {"do": "reload", "model": folder, "permute_layer": None, "unit_scales": False}
    main = [
        {"do": "greedy", "prompts": reference.prompts, "tokens": len(reference.completions[0])},
        *(score, reload | {"permute_layer": permuted_layer(checkpoint)}, score, reload, score),
        *({"do": "forced", "token": token, "tokens": 4} for token in [*reference.end_ids, reference.plain_id]),
        {"do": "capacity"},
    ]
    engines = {"main": {"model": folder, "settings": settings, "steps": main}}
    blocks = off_by_one(checkpoint, prompt_tokens)
    if blocks is not None:
        shifted = settings | {"hf_overrides": {"block_configs": blocks, "layer_types": None}}
        engines["window"] = {"model": folder, "settings": shifted, "steps": [score]}
    narrow = settings | {"dtype": "bfloat16"}
    engines["bfloat16"] = {"model": folder, "settings": narrow, "steps": [{"do": "capacity"}]}
    fp8 = [{"do": "capacity"}, score]
    if has_scales(checkpoint):
        fp8 += [reload | {"unit_scales": True}, score]
    engines["fp8"] = {"model": folder, "settings": narrow | {"kv_cache_dtype": "fp8"}, "steps": fp8}
    return engines


def off_by_one(checkpoint: Checkpoint, prompt_tokens: int) -> list[dict[str, int | None]] | None:
    """Return blocks whose narrowest window is one wider in its first layer; None if no prompt fills that window."""
    windows = [window for _, window in checkpoint.blocks]
    narrowest = min((window for window in windows if window is not None), default=prompt_tokens)
    if narrowest >= prompt_tokens or not is_child(checkpoint.config):
        return None
    blocks = [{"num_local_experts": experts, "sliding_window": window} for experts, window in checkpoint.blocks]
    blocks[windows.index(narrowest)]["sliding_window"] = narrowest + 1
    return blocks


def has_scales(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint has KV scales other than 1."""
    names = [name for name in checkpoint.tensors if name.endswith(checkpoint.family.layer.kv_scales)]
    return any(float(checkpoint.read(name)) != 1.0 for name in names)


def run_engines(run_dir: Path, python: Path, engines: list[dict[str, Any]]) -> list[list[Any]]:
    """Run engines with the driver, in one process of vLLM's environment; return the results of their steps.

    Args:
        run_dir: folder of job.json, results.json and vllm.log.
        python: interpreter of vLLM's environment.
        engines: engines of `plan_engines`.

    Raises:
        ValueError: an engine did not start or failed; shows the end of its log.
    """
    job, results, log = run_dir / "job.json", run_dir / "results.json", run_dir / "vllm.log"
    job.write_text(json.dumps(engines))
    command = [str(python), "-m", "lit_puzzle.serve.vllm.driver", str(job), str(results)]
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ, check=False)
    if done.returncode:
        raise ValueError(f"vLLM ended with code {done.returncode}; the end of {log}:\n{log.read_text()[-3000:]}")
    return json.loads(results.read_text())
