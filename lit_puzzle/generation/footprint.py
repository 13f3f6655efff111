"""Bytes of generation: by transformers with a loop of our own, or by vLLM.

    transformers   weights + KV cache of all rows in progress, one layer of it twice while it grows
                   + the logits of the rows; or, while prompts are read, one layer's activations: those of its experts,
                   or of its attention with the scores of eager attention
    vLLM           the share of the device that it takes for itself, whatever the weights need

Pure functions; imports no torch; reads and writes nothing. `lit_puzzle.generation.decoding` and `vllm_engine` are what
is counted.
"""

from __future__ import annotations

from lit_puzzle.model.footprint import (
    BYTES,
    ModelSize,
    attention_bytes,
    forward_bytes,
    kv_bytes,
    largest_kv_layer,
    stored_bytes,
)
from lit_puzzle.run.footprint import Device, Knob, smaller
from lit_puzzle.run.recipe_values import Values

PREFILL_PAIRS = 2**24  # of lit_puzzle.generation.decoding: rows x tokens x tokens of prompts that are read together
STEP_SCORES = 6  # copies of the scores of a new token, half of them in float32
LOGIT_COPIES = 3
EAGER_SCORES = 4  # copies of the scores that eager attention holds: products, with sinks, shifted, softmax
MOST_EAGER = 2**26  # of lit_puzzle.model.decoding_attention: more scores are computed in linear memory
VLLM_SHARE = 0.92  # gpu_memory_utilization of vLLM


def engine_name(engine: Values, device: Device) -> str:
    """Return the engine that a recipe's settings mean on a device: `auto` is vLLM on a GPU."""
    name = str(engine.at("name"))
    return ("vllm" if device.kind == "cuda" else "transformers") if name == "auto" else name


def decoding_bytes(
    size: ModelSize, rows: int, prompt_tokens: float, new_tokens: float, width: int, eager: bool = True
) -> dict[str, float]:
    """Return what decoding holds beside the weights.

    Args:
        size: the model.
        rows: rows in progress.
        prompt_tokens: of each.
        new_tokens: of each, at most.
        width: bytes of a number of the cache.
        eager: whether short prompts are read by eager attention, which holds their scores.
    """
    tokens = prompt_tokens + new_tokens
    read = min(rows, max(1, int(PREFILL_PAIRS / prompt_tokens**2))) if eager else rows
    scores = EAGER_SCORES * min(read * size.heads * prompt_tokens**2, MOST_EAGER) * width if eager else 0.0
    precision = "float32" if width == 4 else "bfloat16"
    tokens_read = read * prompt_tokens
    layer = max(forward_bytes(size, tokens_read, precision), attention_bytes(size, tokens_read, precision) + scores)
    prefill = layer + kv_bytes(size, read, prompt_tokens, width)
    repeated = 2 * size.queries * width if width == 4 else 0.0  # float32 on a CPU repeats keys and values
    attention = rows * tokens * (repeated + STEP_SCORES * size.heads * width)
    growing = largest_kv_layer(size, rows, tokens, width) / 2  # keys, then values, beside their longer copy
    grown = {
        "KV cache": kv_bytes(size, rows, tokens, width),
        "attention of a step": max(attention, growing),
        "logits of a step": rows * LOGIT_COPIES * size.vocab * 4.0,
    }
    if prefill > sum(grown.values()):
        return {"prompts while they are read": prefill}
    return grown


def engine_bytes(
    size: ModelSize, engine: Values, device: Device, prompt_tokens: float, new_tokens: float, sequences: float
) -> dict[str, float]:
    """Return what an engine of a recipe holds on one device, weights included, for a number of sequences."""
    width = BYTES[str(engine.at("dtype"))]
    if engine_name(engine, device) == "server":  # the model is somewhere else
        return {}
    if engine_name(engine, device) == "vllm":
        return vllm_bytes(size, device, int(engine.get("tensor_parallel", 1)))
    weights = {"weights": float(size.parameters * width)}
    return weights | decoding_bytes(
        size, min(engine.whole("batch_size", least=1), int(sequences)), prompt_tokens, new_tokens, width
    )


def vllm_bytes(size: ModelSize, device: Device, tensor_parallel: int, share: float = VLLM_SHARE) -> dict[str, float]:
    """Return what vLLM holds on one device: its weights, and what is left of its share for the KV cache."""
    weights = stored_bytes(size) / tensor_parallel
    left = device.memory_bytes * share - weights
    return {"weights (as stored)": weights, "KV cache and work of vLLM": max(left, 0.05 * weights)}


def engine_knobs(engine: Values, device: Device) -> tuple[Knob, ...]:
    """Return the settings of an engine that make it smaller."""
    if engine_name(engine, device) == "server":
        return ()
    if engine_name(engine, device) == "vllm":
        now = int(engine.get("tensor_parallel", 1))
        values = [now * 2**power for power in range(1, 4)]
        return (Knob(engine.key("tensor_parallel"), now, values, "weights shared by {} GPUs"),)
    rows = engine.whole("batch_size", least=1)
    return (Knob(engine.key("batch_size"), rows, smaller(rows), "completions of {} rows together"),)
