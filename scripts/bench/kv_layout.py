"""Bench: the KV cache that the cost model predicts against the one that a real vLLM allocates.

    python scripts/bench/kv_layout.py [--python .venv-vllm/bin/python]

For 16 patterns of layers x 2 context lengths vLLM's own functions (`get_kv_cache_configs`, `get_kv_cache_capacity`)
allocate 40 GiB for 36 layers of gpt-oss-120b's shape, in vLLM's environment and from its real KV-cache specifications;
two patterns are also served: a real engine starts on a random model of 12 small layers and states its capacity.
Compared are the blocks of the pool and the requests of the longest context that fit it. 0.33 has no wheel for CPUs:
its allocation was read in its source and is not run here.

Needs `bash scripts/vllm_env.sh`. Prints every row, requests against those of the parent's pattern and what plain bytes
would say. Ends with one JSON line with `worst_error`, the largest relative error of blocks and requests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from lit_puzzle.costs.accounting import mean_context
from lit_puzzle.costs.kv_layout import WindowCounts, vllm_capacity, window_counts
from lit_puzzle.spec import Scenario

KV_HEADS, HEAD_DIM, GIB = 8, 64, 2**30
MEMORY, CONTEXTS, BATCHED = 40 * GIB, (131072, 16384), 8192
Pattern = tuple[tuple[int | None, int], ...]
# name -> windows and their layers, bytes of a value, tensor parallel, tokens of a block
PATTERNS: dict[str, tuple[Pattern, int, int, int]] = {
    "parent 18 / 18x128": (((None, 18), (128, 18)), 2, 1, 16),
    "released 10 / 8x8192 / 18x128": (((None, 10), (8192, 8), (128, 18)), 2, 1, 16),
    "12 / 6x8192 / 18x128": (((None, 12), (8192, 6), (128, 18)), 2, 1, 16),
    "9 / 9x8192 / 18x128": (((None, 9), (8192, 9), (128, 18)), 2, 1, 16),
    "8 / 10x8192 / 18x128": (((None, 8), (8192, 10), (128, 18)), 2, 1, 16),
    "6 / 6x8192 / 6x2048 / 18x128": (((None, 6), (8192, 6), (2048, 6), (128, 18)), 2, 1, 16),
    "9 / 5x8192 / 4x1024 / 18x128": (((None, 9), (8192, 5), (1024, 4), (128, 18)), 2, 1, 16),
    "released, FP8": (((None, 10), (8192, 8), (128, 18)), 1, 1, 16),
    "9 / 9 / 18, FP8": (((None, 9), (8192, 9), (128, 18)), 1, 1, 16),
    "within 1.5: 16 / 20x128": (((None, 16), (128, 20)), 2, 1, 16),
    "within 1.5: 12 / 11x8192 / 13x128": (((None, 12), (8192, 11), (128, 13)), 2, 1, 16),
    "at 1.5: 12 / 6x8192 / 9x512 / 9x128": (((None, 12), (8192, 6), (512, 9), (128, 9)), 2, 1, 16),
    "full only": (((None, 36),), 2, 1, 16),
    "windows only: 36x128": (((128, 36),), 2, 1, 16),
    "released, 8 GPUs, FP8": (((None, 10), (8192, 8), (128, 18)), 1, 8, 16),
    "released, blocks of 128": (((None, 10), (8192, 8), (128, 18)), 2, 1, 128),
}
SERVED: dict[str, Pattern] = {  # the last are the parent's own windows, in every other layer
    "served: 6 / 6x128": ((None, 6), (128, 6)),
    "served: 4 / 2x96 / 6x128": ((None, 4), (96, 2), (128, 6)),
    "served: 2 / 2x96 / 2x64 / 6x128": ((None, 2), (96, 2), (64, 2), (128, 6)),
}
SERVED_CONTEXT, SERVED_MEMORY, SERVED_HEADS, CPU_BLOCK = 2048, 2**28, 2, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        run_inside(json.loads(arguments.job.read_text()), arguments.job.with_suffix(".out"))
        return
    if not arguments.python.is_file():
        raise SystemExit(f"no vLLM environment at {arguments.python}; make one with: bash scripts/vllm_env.sh")
    with tempfile.TemporaryDirectory() as name:
        report(run_vllm(arguments.python, Path(name)))


def run_vllm(python: Path, folder: Path) -> dict[str, Any]:
    """Let vLLM allocate every pattern; return its version, its blocks and its requests by pattern and context."""
    make_models(folder)
    job = folder / "job.json"
    job.write_text(json.dumps({"folder": str(folder)}))
    command = [str(python.absolute()), __file__, f"--job={job}"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"vLLM ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(job.with_suffix(".out").read_text())
    return found


def make_models(folder: Path) -> None:
    """Write a random parent of 12 small layers, and every served pattern as a child of it."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from lit_puzzle.child.assemble import assemble
    from lit_puzzle.model.checkpoint import fingerprint
    from lit_puzzle.spec import BlockSpec, Plan

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 12,
        "vocab_size": 256,
        "head_dim": HEAD_DIM,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": SERVED_HEADS, "sliding_window": 128}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = GptOssConfig(**sizes, **heads, **experts, max_position_embeddings=SERVED_CONTEXT, dtype="bfloat16")
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "parent")
    for number, pattern in enumerate(SERVED.values()):
        chosen = iter([window for window, count in pattern[:-1] for _ in range(count)])
        windows = [128 if layer % 2 == 0 else next(chosen) for layer in range(12)]
        blocks = tuple(BlockSpec(tuple(range(4 if layer else 3)), window) for layer, window in enumerate(windows))
        Plan(fingerprint(folder / "parent"), 4, blocks).save(folder / f"plan{number}.json")
        assemble(folder / f"run{number}", folder / "parent", folder / f"plan{number}.json")


def run_inside(job: dict[str, Any], out: Path) -> None:
    """In vLLM's environment: allocate every pattern, serve some, and write what vLLM says."""
    found: dict[str, Any] = {"patterns": {}, "served": {}}
    for name, (pattern, value_bytes, ranks, block) in PATTERNS.items():
        for context in CONTEXTS:
            found["patterns"][f"{name} @ {context}"] = allocate(pattern, value_bytes, ranks, block, context)
    for number, name in enumerate(SERVED):
        found["served"][name] = serve(Path(job["folder"]) / f"run{number}" / "child")
    import vllm

    out.write_text(json.dumps(found | {"version": vllm.__version__}))


def allocate(pattern: Pattern, value_bytes: int, ranks: int, block: int, context: int) -> tuple[int, float]:
    """Return the blocks and the requests of `context` tokens of the pool that vLLM makes for these layers."""
    import torch
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

    shape: dict[str, Any] = {
        "block_size": block,
        "num_kv_heads": max(1, KV_HEADS // ranks),
        "head_size": HEAD_DIM,
        "dtype": {1: torch.uint8, 2: torch.bfloat16}[value_bytes],
    }
    specs: dict[str, KVCacheSpec] = {}
    for window, count in pattern:
        for _ in range(count):
            own = FullAttentionSpec(**shape) if window is None else SlidingWindowSpec(sliding_window=window, **shape)
            specs[f"layers.{len(specs)}"] = own
    scheduler = SchedulerConfig(
        max_model_len=context, is_encoder_decoder=False, max_num_batched_tokens=BATCHED, async_scheduling=False
    )
    cache = CacheConfig(block_size=block)
    object.__setattr__(cache, "kv_cache_layout", "LBHNC")
    config = VllmConfig(cache_config=cache, scheduler_config=scheduler, device_config=DeviceConfig(device="cpu"))
    model = ModelConfig.__new__(ModelConfig)  # no checkpoint: only its context length is read
    for key in ("max_model_len", "original_max_model_len"):
        object.__setattr__(model, key, context)
    object.__setattr__(config, "model_config", model)
    object.__setattr__(config.cache_config, "block_size", block)
    (made,) = kv_cache_utils.get_kv_cache_configs(config, [specs], [MEMORY])
    return made.num_blocks, kv_cache_utils.get_kv_cache_capacity(config, made)[1]


def serve(folder: Path) -> tuple[int, int, float]:
    """Start an engine; return its batched tokens, its blocks and the requests of the longest context."""
    from vllm import LLM

    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=SERVED_CONTEXT,
        kv_cache_memory_bytes=SERVED_MEMORY,
    )
    config = engine.llm_engine.vllm_config
    cache = config.cache_config
    return config.max_in_flight_tokens, cache.num_gpu_blocks, cache.kv_cache_max_concurrency


def report(found: dict[str, Any]) -> None:
    """Print predicted against allocated, and the JSON line."""
    print(f"vLLM {found['version']}: {MEMORY // GIB} GiB on each GPU, {BATCHED} batched tokens")
    print(
        f"{'pattern @ context':52s} {'blocks':>8s} {'predicted':>9s} {'requests':>9s} {'predicted':>9s}"
        "  over parent  bytes"
    )
    errors: list[float] = []
    for name, (pattern, value_bytes, ranks, block) in PATTERNS.items():
        for context in CONTEXTS:
            blocks, requests = found["patterns"][f"{name} @ {context}"]
            counts, token = window_counts(spread(pattern)), 2 * max(1, KV_HEADS // ranks) * HEAD_DIM * value_bytes
            guess = vllm_capacity(counts, MEMORY, context, token, block, BATCHED)
            errors += [guess.blocks / blocks - 1, guess.requests / requests - 1]
            parent = found["patterns"][f"{next(iter(PATTERNS))} @ {context}"][1]
            print(
                f"{f'{name} @ {context}':52s} {blocks:8d} {guess.blocks:9d} {requests:9.2f} {guess.requests:9.2f}"
                f"  {requests / parent:10.2f}x {plain(counts, context, token):5.2f}x"
            )
    for name, pattern in SERVED.items():
        in_flight, blocks, requests = found["served"][name]
        token = 2 * SERVED_HEADS * HEAD_DIM * 2
        guess = vllm_capacity(
            window_counts(spread(pattern)), SERVED_MEMORY, SERVED_CONTEXT, token, CPU_BLOCK, in_flight
        )
        errors += [guess.blocks / blocks - 1, guess.requests / requests - 1]
        print(f"{name:52s} {blocks:8d} {guess.blocks:9d} {requests:9.2f} {guess.requests:9.2f}")
    worst = max(map(abs, errors))
    print(json.dumps({"worst_error": worst, "compared": len(errors), "version": found["version"]}))


def spread(pattern: Pattern) -> list[int | None]:
    """Return the window of every layer."""
    return [window for window, count in pattern for _ in range(count)]


def plain(counts: WindowCounts, context: int, token_bytes: int) -> float:
    """Return how many times the parent's requests the bytes of every layer alone would say."""
    scenario = Scenario("H100", 1, context - 1, 1)

    def held(windows: WindowCounts, token: int) -> float:
        return token * sum(count * mean_context(scenario, window) for window, count in windows)

    parent = window_counts(spread(next(iter(PATTERNS.values()))[0]))
    return held(parent, 2 * KV_HEADS * HEAD_DIM * 2) / held(counts, token_bytes)


if __name__ == "__main__":
    main()
