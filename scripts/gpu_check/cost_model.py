"""Decode and prefill of one layer on this device, against what the cost model predicts for it.

The layer is transformers' with our attention, in bfloat16, gpt-oss's shape with 32 experts; the predictions are of a
serving engine's kernels (vLLM's), so that a ratio well above 1 is expected of small batches. `measured kernels` are
predicted where the extra `gpu-tables` is installed and has this card.
"""

from collections.abc import Iterator
from typing import Any

import torch
from part import Options, Row, milliseconds, run

from lit_puzzle.costs.block_timing import Bench
from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.gpus import gpus
from lit_puzzle.costs.machine import Machine
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.costs.serving import Block, Deployment, KernelTimes, Setting
from lit_puzzle.spec import Scenario

SHAPE: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 2,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}
SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 32,
    "num_local_experts": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def sources() -> list[KernelTimes]:
    """Return what predicts times; measured kernels only where their tables are installed."""
    try:
        import aiconfigurator_core  # noqa: F401

        from lit_puzzle.costs.measured_kernels import MeasuredKernels
    except ImportError:
        return [Roofline()]
    return [Roofline(), MeasuredKernels()]


def predictions(setting: Setting, block: Block, batch: int, context: int) -> dict[str, float | None]:
    """Return the predicted milliseconds of every source; None where it has no answer."""
    found: dict[str, float | None] = {}
    for source in sources():
        try:
            source.check(setting)
            seconds = (
                source.decode_layer(setting, block, batch, context)
                if batch
                else source.prefill_layer(setting, block, context)
            )
            found[f"{source.name} ms"] = round(1000 * seconds, 4)
        except ValueError:
            found[f"{source.name} ms"] = None
    return found


@torch.inference_mode()
def work(options: Options) -> Iterator[Row]:
    """Time decode steps and prompts of a full and a windowed layer."""
    config, device = SHAPE | (SMALL if options.small else {}), options.device
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    gpu = next((name for name in gpus() if name in card), None)
    dtype = "float32" if device == "cpu" else "bfloat16"
    bench = Bench(config, Machine(device, getattr(torch, dtype), "sink_attention", copies=2))
    engine, shape = ServingEngine(), ModelShape.from_config(config)
    batches, contexts = ([2], [64]) if options.small else ([1, 32], [4096, 16384])
    for window in (None, config["sliding_window"]):
        block = Block(config["num_local_experts"], window)
        for batch, context in [*((b, c) for b in batches for c in contexts), (0, contexts[0])]:
            kind = bench.decode_layer(block, batch, context) if batch else bench.prefill_layer(block, context)
            row: Row = {
                "what": "decode" if batch else "prefill",
                "window": window,
                "batch": batch or 1,
                "tokens": context,
            }
            row["ms"] = round(milliseconds(kind, device, 5) / bench.machine.copies, 4)
            if gpu is not None:
                scenario = Scenario(gpu, 1, context, 1, max(batch, 1), dtype, 1, 1, dtype, dtype)
                row |= predictions(Setting(shape, scenario, Deployment(1, 1, 1), engine), block, batch, context)
            yield row


if __name__ == "__main__":
    run(work)
