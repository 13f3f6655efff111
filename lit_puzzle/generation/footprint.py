"""Bytes of generation: by transformers with a loop of our own, or by vLLM.

    transformers   weights + KV cache of all rows in progress, one layer of it twice while it grows
                   + the logits of the rows; or, while prompts are read, one layer's activations: those of its experts,
                   or of its attention with the scores of eager attention
    vLLM           on a GPU the share of it that vLLM takes, whatever the weights need; on a CPU weights + 4 GiB of KV
    apart          engines in processes of their own beside a model that trains: the same, with vLLM a share of what
                   that model leaves free

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
from lit_puzzle.model.streaming_need import IMPORTED
from lit_puzzle.run.footprint import GIB, Device, Knob, smaller
from lit_puzzle.run.recipe_values import Values

PREFILL_PAIRS = 2**24  # of lit_puzzle.generation.decoding: rows x tokens x tokens of prompts that are read together
STEP_SCORES = 6  # copies of the scores of a new token, half of them in float32
LOGIT_COPIES = 3
EAGER_SCORES = 4  # copies of the scores that eager attention holds: products, with sinks, shifted, softmax
MOST_EAGER = 2**26  # of lit_puzzle.model.decoding_attention: more scores are computed in linear memory
VLLM_SHARE = 0.92  # gpu_memory_utilization of vLLM; beside a model that trains, of what is free
CPU_KV_CACHE_GIB = 4.0  # of lit_puzzle.generation.vllm_engine


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
        return vllm_bytes(size, device, int(engine.get("tensor_parallel", 1)), width)
    weights = {"weights": float(size.parameters * width)}
    return weights | decoding_bytes(
        size, min(engine.whole("batch_size", least=1), int(sequences)), prompt_tokens, new_tokens, width
    )


def vllm_weights(size: ModelSize, device: Device, tensor_parallel: int, width: int) -> float:
    """Return the bytes of vLLM's weights on one device: MXFP4 experts stay as stored on a GPU, a CPU dequantizes."""
    stored = "quantization_config" in size.config and device.kind == "cuda"
    return (stored_bytes(size) if stored else float(size.parameters * width)) / tensor_parallel


def vllm_bytes(size: ModelSize, device: Device, tensor_parallel: int, width: int) -> dict[str, float]:
    """Return what vLLM holds on one device that nobody else uses: its weights, and its share for the KV cache."""
    weights = vllm_weights(size, device, tensor_parallel, width)
    if device.kind == "cpu":
        return {"weights of vLLM": weights, "KV cache of vLLM": CPU_KV_CACHE_GIB * GIB,
                "libraries of vLLM's process": float(IMPORTED)}  # fmt: skip
    left = device.memory_bytes * VLLM_SHARE - weights
    return {"weights of vLLM": weights, "KV cache and work of vLLM": max(left, 0.05 * weights)}


def apart_bytes(
    size: ModelSize,
    engine: Values,
    device: Device,
    held: float,
    prompt_tokens: float,
    new_tokens: int,
    sequences: float,
) -> dict[str, float]:
    """Return what engines of `lit_puzzle.generation.apart` hold beside one process that waits for them.

    Args:
        size: the model, which they read from its folder.
        engine: their settings.
        device: of the process; on a CPU the processes of the job share what the engines take.
        held: bytes of that process.
        prompt_tokens: of each prompt.
        new_tokens: of each completion, at most.
        sequences: of all engines.
    """
    width, ranks = BYTES[str(engine.at("dtype"))], int(engine.get("tensor_parallel", 1))
    given = engine.get("data_parallel", 1)
    engines = given if isinstance(given, int) else device.count // ranks if device.kind == "cuda" else 1
    each = engine_bytes(size, engine, device, prompt_tokens, new_tokens, -(-sequences // max(engines, 1)))
    if device.kind == "cpu":
        of_processes = {} if engine_name(engine, device) == "vllm" else {"libraries": float(IMPORTED)}
        parts = {name: number * max(engines, 1) / device.count for name, number in (each | of_processes).items()}
    elif engine_name(engine, device) == "vllm":
        weights = vllm_weights(size, device, ranks, width)
        one = kv_bytes(size, 1, prompt_tokens + new_tokens, width) / ranks
        left = VLLM_SHARE * (device.usable_bytes - held) - weights
        parts = {"weights": weights, "KV cache and work": max(left, one)}
    else:
        parts = each
    return {f"{name} of engines apart": number for name, number in parts.items()}


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
