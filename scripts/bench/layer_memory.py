"""Bench: memory of one decoder layer of gpt-oss's real shape, in bytes for each token: slopes over three lengths.

    python scripts/bench/layer_memory.py [--lengths 1024 2048 4096] [--residual float32] [--math] [--experts 128]

Hidden 2880, 64 query and 8 key/value heads of 64, 128 experts top-4 of 2880; bf16 autocast, what trains (attention and
norms) in float32, experts and router frozen in bfloat16, as the recipes of real sizes have it. Random weights, one row.
Every allocation of torch counts (its profiler reports them), the weights and their gradients cancel in a slope.

    saved         held between forward and backward: with the layer's input and output
    peak          the most that forward and backward hold together, input and gradients included
    checkpointed  the same two with activation checkpointing: the layer's input is what stays
    decoding      one new token behind so many cached ones, for each cached token: the cache, and the rest

`--residual`: dtype of the layer's input; `--math`: PyTorch's unfused attention, what CUDA falls back to for masks and
heads of another size; `--moe-chunk`: tokens that router and experts take at a time (training.moe_chunk_tokens), fewer
than the shortest length. With `--device cuda` the allocator of CUDA counts. Takes 8 GB with 128 experts and half an
hour on one core; the last line is JSON.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRotaryEmbedding

import lit_puzzle.model.sink_attention  # noqa: F401  (registers it)
from lit_puzzle.generation.kv_rows import CompactCache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_layer(experts: int, window: int | None, device: str = "cpu") -> GptOssDecoderLayer:
    """Return a layer of the real shape; all its experts have the same random values."""
    layer_type = "full_attention" if window is None else "sliding_attention"
    config = GptOssConfig(
        num_hidden_layers=1,
        hidden_size=2880,
        intermediate_size=2880,
        num_local_experts=experts,
        num_experts_per_tok=min(4, experts),
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=16,
        layer_types=[layer_type],
        sliding_window=window,
        attn_implementation="sink_attention",
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        layer = GptOssDecoderLayer(config, 0)
    torch.manual_seed(0)
    for name, parameter in list(layer.named_parameters()):
        module, _, last = name.rpartition(".")
        frozen = name.startswith("mlp.")
        dtype = torch.bfloat16 if frozen else torch.float32
        shape = parameter.shape[1:] if ".experts." in name else parameter.shape
        values = torch.randn(shape).mul_(0.02).to(device, dtype)
        whole = values.expand(parameter.shape).contiguous() if ".experts." in name else values
        layer.get_submodule(module).register_parameter(last, nn.Parameter(whole, requires_grad=not frozen))
    return layer


def held_bytes(work: Callable[[], Any]) -> tuple[int, int, Any]:
    """Return what `work` leaves allocated, the most it holds at once, and its result."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(accumulate(change.nbytes() for change in sorted(changes, key=lambda change: change.start_ns())))
    return held[-1], max(held), result


def step(layer: Any, tokens: int, residual: torch.dtype, checkpointing: bool) -> dict[str, int]:
    """Run forward and backward over a row of tokens."""
    device = layer.self_attn.sinks.device
    rotary = GptOssRotaryEmbedding(config=layer.self_attn.config).to(device)

    def forward() -> tuple[Tensor, Tensor]:
        hidden = torch.randn(1, tokens, 2880, dtype=residual, device=device).requires_grad_()
        tables = rotary(hidden, torch.arange(tokens, device=device)[None])
        with torch.autocast(device.type, torch.bfloat16):
            how = {"attention_mask": None, "position_embeddings": tables}
            out = checkpoint(layer, hidden, use_reentrant=False, **how) if checkpointing else layer(hidden, **how)
        return hidden, out

    def both() -> None:
        hidden, out = forward()
        out.backward(torch.ones_like(out))
        del hidden, out
        layer.zero_grad(set_to_none=True)

    saved, _, kept = held_bytes(forward)
    del kept
    return {"saved": saved, "peak": held_bytes(both)[1]}


@torch.no_grad()
def decode(layer: Any, cached: int, residual: torch.dtype) -> dict[str, int]:
    """Run one new token behind cached ones."""
    config, cache = layer.self_attn.config, CompactCache(config=layer.self_attn.config)
    device = layer.self_attn.sinks.device
    rotary = GptOssRotaryEmbedding(config=config).to(device)
    hidden = torch.randn(1, cached + 1, 2880, dtype=residual, device=device)
    cos, sin = rotary(hidden, torch.arange(cached + 1, device=device)[None])
    with torch.autocast(device.type, torch.bfloat16):
        before = hidden[:, :cached]
        layer.self_attn(before, (cos[:, :cached], sin[:, :cached]), None, cache)
        held = sum(x.nbytes for x in (cache.layers[0].keys, cache.layers[0].values))
        mask = create_causal_mask(
            config, hidden[:, cached:], torch.ones(1, cached + 1, device=device), cache, None, layer_idx=0
        )
        rest = (cos[:, cached:], sin[:, cached:])
        _, peak, _ = held_bytes(lambda: layer.self_attn(hidden[:, cached:], rest, mask, cache))
    return {"cache": held, "decoding peak": peak}


def slopes(lengths: list[int], values: list[dict[str, int]]) -> dict[str, list[int]]:
    """Return bytes per token from each length to the next: equal where memory is linear."""
    pairs = list(zip(pairwise(lengths), pairwise(values), strict=True))
    return {key: [round((to[key] - at[key]) / (b - a)) for (a, b), (at, to) in pairs] for key in values[0]}


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    start, dtype, lengths = time.process_time(), DTYPES[options.residual], options.lengths
    result: dict[str, Any] = {"name": "layer_memory", **vars(options)}
    with sdpa_kernel(SDPBackend.MATH) if options.math else nullcontext():
        for window in options.windows:
            layer = make_layer(options.experts, window or None, options.device)
            if options.moe_chunk is not None:
                from lit_puzzle.training.moe_chunks import chunk_moe

                chunk_moe(layer.mlp, options.moe_chunk)
            name = f"window {window}" if window else "full"
            for checkpointing in (False, True):
                label = f"{name}, checkpointed" if checkpointing else name
                step(layer, 64, dtype, checkpointing)
                found = slopes(lengths, [step(layer, tokens, dtype, checkpointing) for tokens in lengths])
                result[label] = found
                print(f"{label}: {found}", flush=True)
            if not window:
                decode(layer, 64, dtype)
                result["decoding"] = slopes(lengths, [decode(layer, tokens, dtype) for tokens in lengths])
                print(f"decoding: {result['decoding']}", flush=True)
    print(json.dumps({**result, "cpu_seconds": round(time.process_time() - start)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--residual", choices=DTYPES, default="bfloat16")
    parser.add_argument("--math", action="store_true")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 128], help="0: full attention")
    parser.add_argument("--moe-chunk", type=int)
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
