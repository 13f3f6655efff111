"""FLOPs and seconds of the arithmetic of a stage, by the cost model's roofline.

    read             passes x seconds to read the tokens through every layer, and the head where logits are computed
    decode           generated tokens x seconds of a step of `rows` sequences, mean over the growing context
    FLOPs of a token and layer   2 (attention and router matrices + k experts) + 4 Q x tokens that it attends to

The roofline is that of a serving engine's kernels. On a GPU, transformers reads READING times slower than it, and
launches each kernel of a step from Python: HOST_SECONDS a layer and step are added. vLLM decodes as many rows as its
memory holds. Stages also wait for the network, or for a disk of DISK_BYTES_PER_SECOND, where that takes longer. Reads
`gpus.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_puzzle.costs.cost_model import CostModel, DoesNotFitError
from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.gpus import find_gpu
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline, attended_pairs
from lit_puzzle.costs.serving import Deployment, Setting, parent_blocks
from lit_puzzle.model.footprint import ModelSize, model_size
from lit_puzzle.run.footprint import Decoding, Device, Footprint, Work
from lit_puzzle.spec import Scenario

# A layer of gpt-oss's shape on an H100 (docs/gpu.md): 4,096 tokens in 5.0 ms where the roofline says 1.8 and 2.0; one
# token of 1 to 32 rows in 2.3 to 3.4 ms where it says 0.1 to 1.1.
READING = 2.6
HOST_SECONDS = 2.1e-3
HOST_ON_CPU = 4e-4  # about 60 calls of 7 microseconds, an assumption
DISK_BYTES_PER_SECOND = 2e9  # of one local NVMe disk, reading and writing, an assumption


@dataclass(frozen=True)
class Effort:
    """What one part of a stage takes.

    Attributes:
        flops: over all devices.
        seconds: with all devices working.
    """

    flops: float
    seconds: float


def efforts(footprint: Footprint, device: Device) -> Mapping[str, Effort]:
    """Return what each part of a stage's arithmetic takes on a device."""
    return {work.name: Effort(_flops(work), _seconds(work, device)) for work in footprint.works}


def network_seconds(footprint: Footprint, device: Device) -> float:
    """Return the seconds of a stage's traffic over the links of a device."""
    return sum(footprint.network.values()) / find_gpu(device.name).link_bytes_per_second


def disk_seconds(footprint: Footprint) -> float:
    """Return the seconds of a stage's traffic to and from disk."""
    return sum(footprint.traffic.values()) / DISK_BYTES_PER_SECOND


def total_seconds(footprint: Footprint, device: Device) -> float:
    """Return the seconds of a stage: arithmetic, network or disk, whichever is longest."""
    arithmetic = sum(effort.seconds for effort in efforts(footprint, device).values())
    return max(arithmetic, network_seconds(footprint, device), disk_seconds(footprint))


def _flops(work: Work) -> float:
    size = model_size(work.config)
    expert = work.expert_share * size.top_k * 6 * size.hidden * size.inner
    generated = 0 if work.decoding is None else work.decoding.tokens
    read, total = work.read_tokens, work.read_tokens + generated
    flops = 0.0
    for layer in size.layers:
        dense = 2 * (layer.attention + layer.router) + expert
        pairs_read, pairs = attended_pairs(int(read), layer.window), attended_pairs(int(total), layer.window)
        flops += work.passes * (read * dense + 4 * size.queries * pairs_read)
        flops += generated * dense + 4 * size.queries * (pairs - pairs_read)
    head = 2 * size.table * (work.passes * work.head_tokens + generated)
    return work.sequences * (flops + head)


def _seconds(work: Work, device: Device) -> float:
    share = work.sequences / device.count
    if work.decoding is not None and work.decoding.engine == "vllm":
        return _vllm_seconds(work, work.decoding, device)
    slower = 1.0 if device.name == "cpu" else READING
    reading = share * work.passes * slower * _read_seconds(work, device)
    if work.decoding is None:
        return reading
    steps = -(-share // work.decoding.rows) * work.decoding.tokens
    return reading + steps * _step_seconds(work, work.decoding, device)


def _setting(work: Work, device: Device) -> Setting:
    dtype = "float32" if work.dtype == "float32" and find_gpu(device.name).float32_flops else "bfloat16"
    scenario = Scenario(
        device.name,
        1,
        max(int(work.read_tokens), 1),
        1,
        kv_dtype=dtype,
        weight_dtype=dtype,
        expert_dtype=dtype,
    )
    sequences = find_gpu(device.name).vllm.max_sequences
    return Setting(
        ModelShape.from_config(work.config), scenario, Deployment(1, 1, 1), ServingEngine(max_sequences=sequences)
    )


def _read_seconds(work: Work, device: Device) -> float:
    """Return the seconds to read the tokens of one sequence once."""
    times, setting, tokens = Roofline(), _setting(work, device), int(work.read_tokens)
    if tokens == 0:
        return 0.0
    seconds = sum(times.prefill_layer(setting, block, tokens) for block in parent_blocks(work.config))
    size = model_size(work.config)
    head = 2 * size.table * work.head_tokens / _flops_per_second(work, device)
    return seconds * _share_of_experts(size, work.expert_share) + head


def _share_of_experts(size: ModelSize, share: float) -> float:
    """Return the factor on a layer's time when more experts are evaluated for a token."""
    expert = size.top_k * 6 * size.hidden * size.inner
    dense = 2 * (size.layers[0].attention + size.layers[0].router)
    return (dense + share * expert) / (dense + expert)


def _flops_per_second(work: Work, device: Device) -> float:
    gpu = find_gpu(device.name)
    peak = gpu.float32_flops if work.dtype == "float32" and gpu.float32_flops else gpu.bfloat16_flops
    return Roofline().dense_arithmetic * (peak or gpu.bfloat16_flops)


def _step_seconds(work: Work, decoding: Decoding, device: Device) -> float:
    """Return the seconds of one step of transformers' loop, at the middle of the completion."""
    times, setting = Roofline(), _setting(work, device)
    context = work.read_tokens + decoding.tokens / 2
    host = HOST_ON_CPU if device.name == "cpu" else HOST_SECONDS
    seconds = times.decode_rest(setting, decoding.rows)
    for block in parent_blocks(work.config):
        seen = min(context, block.window_tokens or context)
        seconds += times.decode_layer(setting, block, decoding.rows, seen) + host
    return seconds


def _vllm_seconds(work: Work, decoding: Decoding, device: Device) -> float:
    """Return the seconds of vLLM, which reads and decodes with as many rows as fit."""
    quantized = "quantization_config" in work.config
    scenario = Scenario(
        device.name,
        decoding.tensor_parallel,
        max(int(work.read_tokens), 1),
        decoding.tokens,
        kv_dtype="bfloat16",
        tensor_parallel=decoding.tensor_parallel,
        expert_dtype="mxfp4" if quantized else "bfloat16",
    )
    model = CostModel(ModelShape.from_config(work.config), scenario, Roofline())
    try:
        speed = model.best(parent_blocks(work.config)).tokens_per_second
    except DoesNotFitError:
        return float("inf")
    replicas = device.count / decoding.tensor_parallel
    return work.sequences * decoding.tokens / (speed * replicas)
