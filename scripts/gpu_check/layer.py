"""One decoder layer of gpt-oss's shape on this device: bytes per token, against a CPU's, and time.

Memory by `scripts/bench/layer_memory.py`, whose slopes on a CPU are in `docs/gpu.md`; 32 experts, so that the card may
be small. `plan` is what `--plan` computes for the same bytes. Then the time of forward and backward, as a share of the
card's bfloat16 peak where it is known.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from part import Options, Row, milliseconds, run
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from layer_memory import decode, make_layer, slopes, step

from lit_puzzle.costs.gpus import gpus
from lit_puzzle.model.footprint import inside_bytes, model_size, saved_bytes

LENGTHS = [4096, 8192, 16384]
ATTENTION_FLOP = 2 * 2880 * 64 * (64 + 8 + 8 + 64)  # of a token: the four projections; scores are not counted
EXPERT_FLOP = 2 * 4 * 3 * 2880 * 2880


def work(options: Options) -> Iterator[Row]:
    """Measure slopes, then a step."""
    lengths, device = [32, 64, 96] if options.small else LENGTHS, options.device
    card = torch.cuda.get_device_name() if device == "cuda" else device
    peak = next((gpu.bfloat16_flops for name, gpu in gpus().items() if name in card), None)
    for window in (None, 128):
        layer = make_layer(2 if options.small else 32, window, device)
        for checkpointing in (False, True):
            step(layer, 16, torch.bfloat16, checkpointing)
            found = slopes(lengths, [step(layer, tokens, torch.bfloat16, checkpointing) for tokens in lengths])
            for key, values in found.items():
                row = {"bytes per token": key, "window": window, "checkpointed": checkpointing, **_named(values)}
                # of a hundred tokens the gradients of the weights are the peak, which no formula of tokens tells
                untold = checkpointing or (options.small and key == "peak")
                yield row | {"plan": None if untold else _plan(layer.self_attn.config, window, key)}
        yield _timed(layer, window, lengths[0], peak)
        del layer
    layer = make_layer(4, None, device)
    for key, values in slopes(lengths, [decode(layer, tokens, torch.bfloat16) for tokens in lengths]).items():
        yield {"bytes per cached token": key, **_named(values)}


def _plan(config: Any, window: int | None, key: str) -> int:
    """Return the bytes for a token by the formulas of `--plan`."""
    block = {"num_local_experts": config.num_local_experts, "sliding_window": window}
    size = model_size(config.to_dict() | {"model_type": "gpt_oss_puzzle", "block_configs": [block]})
    at = saved_bytes if key == "saved" else inside_bytes
    return round((at(size, 2**20, "bf16-mixed") - at(size, 2**19, "bf16-mixed")) / 2**19)


def _timed(layer: Any, window: int | None, tokens: int, peak: float | None) -> Row:
    """Return the time of forward and backward of a layer whose experts are frozen."""
    device = layer.self_attn.sinks.device
    hidden = torch.randn(1, tokens, 2880, dtype=torch.bfloat16, device=device).requires_grad_()
    tables = GptOssRotaryEmbedding(config=layer.self_attn.config).to(device)(
        hidden, torch.arange(tokens, device=device)[None]
    )

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            out = layer(hidden, attention_mask=None, position_embeddings=tables)
        out.backward(torch.ones_like(out))
        layer.zero_grad(set_to_none=True)

    ms = milliseconds(train, device.type, 1)
    flop_per_s = (3 * ATTENTION_FLOP + 2 * EXPERT_FLOP) * tokens / ms * 1000
    share = None if peak is None else round(flop_per_s / peak, 3)
    return {"step": "layer", "window": window, "tokens": tokens, "ms": ms} | {
        "tflop_per_s": round(flop_per_s / 1e12, 2),
        "peak_share": share,
    }


def _named(values: list[int]) -> dict[str, int]:
    return {f"slope {i + 1}": value for i, value in enumerate(values)}


if __name__ == "__main__":
    run(work)
