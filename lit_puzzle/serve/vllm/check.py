"""Whether vLLM serves a checkpoint folder as transformers computes it: to be run before a model is deployed.

Reads a checkpoint folder (stock gpt-oss, assembled, distilled, recovered or exported) and drives a real vLLM in an
environment of its own. Writes report.json (every check: passed, failed or skipped, why, figures) and, while it works,
job.json, answers.json, vllm.log and server.log.

Proofs: greedy tokens and teacher-forced log-probabilities against transformers; a reload of live weights against the
fresh engine; stop tokens; an FP8 KV cache; the OpenAI-compatible server. Negative controls show that the comparison
would notice: one window off by one, the experts of one layer permuted without its router, KV scales dropped.
Comparing in float32 is exact; in bfloat16 (what GPUs serve) only distances are judged, because rounding alone soon
changes greedy tokens.

Memory, one after the other: transformers, 4 bytes a parameter in float32 or 2; then vLLM's the same + kv_cache_gib,
and again for the server. Disk: a few hundred KiB. Traffic: none between processes but these files and local HTTP.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import KV_SCALES
from lit_puzzle.run.folder import require_input
from lit_puzzle.serve.vllm.check_reference import Reference, make_reference
from lit_puzzle.serve.vllm.check_server import check_server, serving
from lit_puzzle.serve.vllm.report import Check, distance, judged, skipped, write_report

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.3}  # of the largest difference; of the mean one
PROBE = """
import importlib.util, sys, importlib.metadata as m
found = [p.value for p in m.entry_points(group="vllm.general_plugins") if p.name == "lit_puzzle"]
sys.exit(not (importlib.util.find_spec("vllm") and found))
"""


def serve_check(
    run_dir: Path,
    checkpoint: Path,
    python: Path = Path(".venv-vllm/bin/python"),
    dtype: Literal["float32", "bfloat16"] = "float32",
    tolerance: float | None = None,
    prompts: int = 8,
    prompt_tokens: int = 96,
    new_tokens: int = 48,
    question: str = "What is 2 + 3?",
    kv_cache_gib: float = 0.25,
    server: bool = True,
    server_seconds: float = 600.0,
    seed: int = 0,
) -> dict[str, float]:
    """Checks a folder in vLLM.

    Args:
        run_dir: The run's folder; gets report.json.
        checkpoint: The folder that would be served.
        python: Interpreter of vLLM's environment (`scripts/vllm_env.sh` prints it).
        dtype: float32 compares exactly; bfloat16 for GPUs and models that do not fit otherwise.
        tolerance: Of log-probabilities; None: 1e-4 for the largest difference in float32, 0.3 for the mean in bfloat16.
        prompts: Random prompts that are continued and scored.
        prompt_tokens: Their length; longer than a window, or the window is not exercised.
        new_tokens: Greedy tokens after each prompt.
        question: Asked at each reasoning effort through the server.
        kv_cache_gib: KV cache of vLLM.
        server: Whether to start the HTTP server too.
        server_seconds: How long it may take to start.
        seed: Of the prompts.

    Returns:
        `passed`, `failed`, `skipped` (numbers of checks) and the figures of each check, `<check>/<figure>`.

    Raises:
        ValueError: No vLLM there, an engine does not start, or a check failed (after report.json is written).
    """
    if min(prompts, prompt_tokens, new_tokens) < 1 or kv_cache_gib <= 0:
        raise ValueError("prompts, prompt_tokens, new_tokens and kv_cache_gib must be positive.")
    python = require_vllm(python)
    checkpoint = require_input(checkpoint, "checkpoint").resolve()
    opened = Checkpoint(checkpoint)
    reference = make_reference(checkpoint, dtype, prompts, prompt_tokens, new_tokens, question, seed)
    length = max(len(ids) for ids in (*reference.documents, *reference.chats.values())) + new_tokens + 1
    settings = {"dtype": dtype, "max_model_len": length, "kv_cache_memory_bytes": int(kv_cache_gib * 2**30)}
    engines = plan_engines(opened, reference, settings, prompt_tokens)
    answers = dict(zip(engines, run_engines(run_dir, python, list(engines.values())), strict=True))
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    checks = judge(opened, reference, answers, dtype == "float32", limit)
    if server and reference.chats:
        options = [f"--dtype={dtype}", f"--max-model-len={length}", "--enforce-eager"]
        options.append(f"--kv-cache-memory-bytes={settings['kv_cache_memory_bytes']}")
        with serving(python, checkpoint, options, run_dir / "server.log", server_seconds) as port:
            checks += check_server(port, question, reference, dtype == "float32")
    else:
        checks.append(skipped("server", "not asked for" if reference.chats else "the folder has no chat template"))
    results = write_report(run_dir / "report.json", checks, {"vllm": answers["main"][-1]["version"]})
    failed = [f"{check.name} ({check.why})" for check in checks if check.outcome == "failed"]
    if failed:
        raise ValueError(f"{checkpoint} is not served as transformers computes it: {'; '.join(failed)}.")
    return results


def require_vllm(python: Path) -> Path:
    """The absolute path of an interpreter that has vLLM and this project's plugin.

    Raises:
        ValueError: It is not there or has not; names the script that makes it.
    """
    make = "Make one with: bash scripts/vllm_env.sh (its last line is the path for `python`)."
    if not python.is_file():
        raise ValueError(f"There is no interpreter {str(python)!r} of a vLLM environment. {make}")
    python = python.absolute()  # not resolved: the link is what makes it that environment's
    if subprocess.run([python, "-c", PROBE], capture_output=True, check=False).returncode:
        raise ValueError(f"{python} lacks vllm or the plugin of lit_puzzle. {make}")
    return python


def plan_engines(
    checkpoint: Checkpoint, reference: Reference, settings: dict[str, Any], prompt_tokens: int
) -> dict[str, dict[str, Any]]:
    """The engines to start, by name, and what each is asked."""
    folder = str(checkpoint.folder)
    score = {"do": "score", "documents": reference.documents}
    reload = {"do": "reload", "model": folder, "permute_layer": None, "unit_scales": False}
    main = [
        {"do": "greedy", "prompts": reference.prompts, "tokens": len(reference.answers[0])},
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


def permuted_layer(checkpoint: Checkpoint) -> int:
    """The layer with most experts, whose permutation is the likeliest to change anything."""
    counts = [experts for experts, _ in checkpoint.blocks]
    return counts.index(max(counts))


def off_by_one(checkpoint: Checkpoint, prompt_tokens: int) -> list[dict[str, int | None]] | None:
    """Blocks whose narrowest window is one wider in the first layer that has it; None when no prompt fills it."""
    windows = [window for _, window in checkpoint.blocks]
    narrowest = min((window for window in windows if window is not None), default=prompt_tokens)
    if narrowest >= prompt_tokens or checkpoint.config["model_type"] != "gpt_oss_puzzle":
        return None
    blocks = [{"num_local_experts": experts, "sliding_window": window} for experts, window in checkpoint.blocks]
    blocks[windows.index(narrowest)]["sliding_window"] = narrowest + 1
    return blocks


def has_scales(checkpoint: Checkpoint) -> bool:
    """Whether there are KV scales that dropping would change."""
    names = [name for name in checkpoint.tensors if name.endswith(KV_SCALES)]
    return any(float(checkpoint.read(name)) != 1.0 for name in names)


def run_engines(run_dir: Path, python: Path, engines: list[dict[str, Any]]) -> list[list[Any]]:
    """Lets the driver run them all in one process of vLLM's environment.

    Raises:
        ValueError: One did not start or answer; shows the end of its log.
    """
    job, answers, log = run_dir / "job.json", run_dir / "answers.json", run_dir / "vllm.log"
    job.write_text(json.dumps(engines))
    command = [str(python), "-m", "lit_puzzle.serve.vllm.driver", str(job), str(answers)]
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ, check=False)
    if done.returncode:
        raise ValueError(f"vLLM ended with code {done.returncode}; the end of {log}:\n{log.read_text()[-3000:]}")
    return json.loads(answers.read_text())


def judge(
    checkpoint: Checkpoint, reference: Reference, answers: dict[str, list[Any]], exact: bool, limit: float
) -> list[Check]:
    """The checks that engines answered; in float32 by the largest difference, else by the mean one."""
    found, permuted, again = answers["main"][1], answers["main"][3], answers["main"][5]
    forced = answers["main"][6:-1]
    error = distance(found, reference.scores)[not exact]
    checks = [
        judge_greedy(reference.answers, answers["main"][0], exact),
        judged("log_probabilities", error <= limit, f"differ by {error:.2g} (allowed {limit:g})", difference=error),
        judge_reload(found, again),
        judge_stops(reference, forced),
        judge_capacity(answers["bfloat16"][0]["tokens"], answers["fp8"][0]["tokens"]),
    ]
    noticed = max(limit, 2 * error)
    controls = {"control_experts": permuted, "control_window": answers["window"][0] if "window" in answers else None}
    for name, scores in controls.items():
        if scores is None:
            checks.append(skipped(name, "no window is narrower than prompt_tokens in a gpt_oss_puzzle"))
            continue
        wrong = distance(scores, reference.scores)[not exact]
        why = f"log-probabilities differ by {wrong:.2g}, noticed above {noticed:.2g}"
        checks.append(judged(name, wrong > noticed, why, difference=wrong))
    return [*checks, judge_scales(answers["fp8"], reference)]


def judge_greedy(expected: Sequence[list[int]], found: Sequence[list[int]], exact: bool) -> Check:
    """Token for token."""
    pairs = [pair for row, other in zip(expected, found, strict=True) for pair in zip(row, other, strict=True)]
    equal = sum(a == b for a, b in pairs)
    if not exact:
        return skipped("greedy_tokens", f"{equal} of {len(pairs)} are transformers'; rounding decides in bfloat16")
    why = f"{equal} of {len(pairs)} are transformers'"
    return judged("greedy_tokens", equal == len(pairs), why, equal=equal, tokens=len(pairs))


def judge_reload(fresh: Sequence[list[float]], again: Sequence[list[float]]) -> Check:
    """After wrong weights and the right ones again, the engine is what it was when it started."""
    largest, _ = distance(fresh, again)
    why = f"log-probabilities differ by {largest:.2g} from the fresh engine's"
    return judged("reload", largest <= 1e-6, why, difference=largest)


def judge_stops(reference: Reference, forced: Sequence[dict[str, Any]]) -> Check:
    """An answer ends at each end token of generation_config.json, and at no other token."""
    wrong = [
        token
        for token, answer in zip([*reference.end_ids, reference.plain_id], forced, strict=True)
        if (answer["finish_reason"] == "stop") != (token in reference.end_ids)
        or len(answer["ids"]) != (1 if token in reference.end_ids else 4)
    ]
    why = f"stops at {reference.end_ids} and nowhere else" if not wrong else f"not as it should at {wrong}"
    return judged("stop_tokens", not wrong, why, stop_tokens=len(reference.end_ids))


def judge_capacity(narrow: int, fp8: int) -> Check:
    """The same memory holds twice the tokens."""
    return judged("kv_tokens", fp8 == 2 * narrow, f"{fp8} in FP8, {narrow} in bfloat16", ratio=fp8 / narrow)


def judge_scales(fp8: Sequence[Any], reference: Reference) -> Check:
    """KV scales of the checkpoint are used: without them log-probabilities change."""
    quality_loss = distance(fp8[1], reference.scores)[1]
    if len(fp8) == 2:
        return skipped(
            "control_scales", f"the checkpoint has no KV scales but 1; FP8 costs {quality_loss:.2g} on average"
        )
    changed = distance(fp8[1], fp8[3])[0]
    bare = distance(fp8[3], reference.scores)[1]
    why = f"noticed: FP8 costs {quality_loss:.2g} on average, without scales {bare:.2g}"
    return judged("control_scales", changed > 1e-3, why, quality_loss=quality_loss, quality_loss_without=bare)
