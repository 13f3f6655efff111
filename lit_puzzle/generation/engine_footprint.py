"""Bytes of an engine of vLLM beside a model that trains on what it generates.

    GPU, generating   gpu_memory_share of the device, or weights + kv_cache_gib: W / R for the weights, the rest is KV
    GPU, training     nothing: the engine sleeps, its weights are in the memory of the machine
    servers           nothing here: the GPUs of a server are its own (92% of each, or weights + kv_cache_gib)
    CPU               weights + kv_cache_gib (4 GiB) + libraries of the engine's process, all the time

W bytes of the weights (MXFP4 experts as stored on a GPU), R processes that share an engine. The share must hold the
weights and the KV cache of one completion. Pure functions; imports no torch; reads and writes nothing.
`lit_puzzle.generation.rollout_engine` is what is counted; on GPUs nothing has been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_puzzle.generation.footprint import CPU_KV_CACHE_GIB, vllm_weights
from lit_puzzle.model.footprint import BYTES, ModelSize, kv_bytes
from lit_puzzle.model.streaming_need import IMPORTED
from lit_puzzle.run.footprint import GIB, Device, Knob
from lit_puzzle.run.recipe_values import Values

SHARE = 0.3  # of lit_puzzle.generation.rollout_settings
CONTEXT_TOKENS = 131_072  # of gpt-oss, where no config.json says it
LOWER_SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


@dataclass(frozen=True)
class EngineBeside:
    """What an engine of vLLM holds, for one process that trains.

    Attributes:
        generating: bytes on the device while it generates.
        training: bytes on the device while the model trains.
        host: bytes in the memory of the machine, on GPUs.
        knobs: settings that make it smaller.
        refusals: what vLLM would refuse.
        tensor_parallel: processes that share it.
    """

    generating: Mapping[str, float]
    training: Mapping[str, float]
    host: Mapping[str, float]
    knobs: tuple[Knob, ...]
    refusals: tuple[str, ...]
    tensor_parallel: int


def engine_beside(size: ModelSize, grpo: Values, precision: str, device: Device) -> EngineBeside | None:
    """Return what vLLM holds for rollouts; None where the model that trains generates by itself.

    Args:
        size: the child.
        grpo: values of a recipe with `rollouts` (`lit_puzzle.generation.rollout_settings`): `grpo` or `on_policy`.
        precision: of the layers in training.
        device: of the process.
    """
    if grpo.get("rollouts.engine") not in ("vllm", "server"):
        return None
    if grpo.get("rollouts.engine") == "server":
        return EngineBeside({}, {}, {}, (), (), 1)
    dtype = str(grpo.get("rollouts.dtype", "auto"))
    width = BYTES["float32" if dtype == "auto" and precision == "float32" else "bfloat16" if dtype == "auto" else dtype]
    ranks, cache_gib = int(grpo.get("rollouts.tensor_parallel", 1)), grpo.get("rollouts.kv_cache_gib")
    weights = vllm_weights(size, device, ranks, width)
    if device.kind == "cpu":
        cache = float(cache_gib or CPU_KV_CACHE_GIB) * GIB
        held = {"weights of vLLM": weights, "KV cache of vLLM": cache, "libraries of vLLM's process": float(IMPORTED)}
        return EngineBeside(held, held, {}, (), (), ranks)
    share = float(grpo.get("rollouts.gpu_memory_share", SHARE))
    room = float(cache_gib) * GIB if cache_gib else share * device.memory_bytes - weights
    tokens = int(grpo.get("rollouts.context_tokens") or size.config.get("max_position_embeddings") or CONTEXT_TOKENS)
    one = kv_bytes(size, 1, tokens, width) / ranks
    return EngineBeside(
        {"weights of vLLM": weights, "KV cache and work of vLLM": max(room, 0.0)},
        {},
        {"weights of vLLM while it sleeps": weights},
        () if cache_gib else (_share_knob(grpo, share),),
        () if room >= one else (_too_small(share, cache_gib, device, weights, one, tokens),),
        ranks,
    )


def _share_knob(grpo: Values, share: float) -> Knob:
    lower = [value for value in LOWER_SHARES if value < share]
    return Knob(grpo.key("rollouts.gpu_memory_share"), share, lower, "share of a GPU for vLLM {}")


def _too_small(share: float, cache_gib: object, device: Device, weights: float, one: float, tokens: int) -> str:
    given = (
        f"rollouts.kv_cache_gib={cache_gib}"
        if cache_gib
        else f"rollouts.gpu_memory_share={share:g} of {device.memory_bytes / GIB:,.0f} GiB"
    )
    return (
        f"{given} was given; vLLM needs {weights / GIB:,.2f} GiB for its weights and {one / GIB:,.2f} GiB for the KV "
        f"cache of one completion of {tokens:,} tokens. Raise it, set rollouts.context_tokens to the longest prompt "
        "with its completion, or share an engine (rollouts.tensor_parallel)."
    )
