"""Bench: the numbers of `lit_puzzle/model/activation_bytes.py`: bytes of one decoder layer per token and channel.

    python scripts/bench/layer_bytes.py [float32] [bf16-mixed] [bfloat16]

Counts every storage that is alive while one layer runs, in layers that are wide in one size after another: expert
width, hidden, queries, keys. Each gives one moment: how the bytes per token change with each size. Prints rows in the
order of `Held`: D, k I, k D, Q, K, E, constant.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRotaryEmbedding

import lit_puzzle.model.sink_attention  # noqa: F401  (registers with transformers)

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.live_bytes import LiveBytes

WIDE = {  # D hidden, H query heads, G key-value heads, C channels of a head, I expert width, E experts, k of a token
    "inner": {"D": 32, "H": 2, "G": 1, "C": 32, "I": 512, "E": 8, "k": 4},
    "hidden": {"D": 512, "H": 2, "G": 1, "C": 32, "I": 32, "E": 8, "k": 4},
    "queries": {"D": 32, "H": 64, "G": 1, "C": 32, "I": 16, "E": 4, "k": 1},
    "keys": {"D": 32, "H": 16, "G": 16, "C": 32, "I": 16, "E": 4, "k": 1},
}
MODES = {
    "float32": (torch.float32, torch.float32, False),
    "bf16-mixed": (torch.float32, torch.bfloat16, True),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
}
LENGTHS = (1024, 2048)


def make_layer(sizes: dict[str, int], mode: str) -> tuple[Any, GptOssRotaryEmbedding]:
    """Return a layer with frozen experts and router; what trains has the first dtype of the mode."""
    config = GptOssConfig(
        hidden_size=sizes["D"],
        num_attention_heads=sizes["H"],
        num_key_value_heads=sizes["G"],
        head_dim=sizes["C"],
        intermediate_size=sizes["I"],
        num_local_experts=sizes["E"],
        num_experts_per_tok=sizes["k"],
        num_hidden_layers=2,
        layer_types=["full_attention", "full_attention"],
        attn_implementation="sink_attention",
        experts_implementation="grouped_mm",
    )
    layer = GptOssDecoderLayer(config, 0)
    trains, frozen, _ = MODES[mode]
    for name, parameter in layer.named_parameters():
        parameter.data = torch.randn_like(parameter).mul_(0.05).to(frozen if name.startswith("mlp.") else trains)
        parameter.requires_grad_(not name.startswith("mlp."))
    return layer, GptOssRotaryEmbedding(config=config)


def held(layer: Any, rotary: Any, tokens: int, mode: str) -> dict[str, int]:
    """Return the bytes at the fullest moments without gradients and of both passes, and those between the passes."""
    _, stream, mixed = MODES[mode]
    hidden = torch.randn(1, tokens, int(layer.input_layernorm.weight.numel()), dtype=stream)
    tables = rotary(hidden, torch.arange(tokens)[None])
    found = {}
    for grad in (False, True):
        gc.collect()
        with LiveBytes() as live, torch.set_grad_enabled(grad):
            given = hidden.clone().requires_grad_(grad)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                out = layer(given, attention_mask=None, position_embeddings=tables)
            if not grad:
                found["forward"] = live.peak
                continue
            found["recorded"], found["saved"] = live.peak, live.now
            live.peak = live.now
            out.backward(torch.ones_like(out))
            found["backward"] = live.peak
        layer.zero_grad(set_to_none=True)
    return found


def per_token(sizes: dict[str, int], mode: str) -> dict[str, float]:
    """Return bytes per token: the slope between two lengths."""
    layer, rotary = make_layer(sizes, mode)
    short, long = (held(layer, rotary, tokens, mode) for tokens in LENGTHS)
    return {key: (long[key] - short[key]) / (LENGTHS[1] - LENGTHS[0]) for key in short}


def moment(wide: str, mode: str) -> dict[str, list[float]]:
    """Return the row of every quantity near one shape."""
    sizes = WIDE[wide]
    base = per_token(sizes, mode)
    steps = {"D": 32, "I": 16, "H": 16, "G": -8 if sizes["G"] > 8 else 1, "E": 4, "k": -1 if sizes["k"] > 1 else 1}
    near = {key: per_token({**sizes, key: sizes[key] + step}, mode) for key, step in steps.items()}
    rows = {}
    for name, value in base.items():
        slope = {key: (near[key][name] - value) / steps[key] for key in steps}
        k, hidden, inner = sizes["k"], sizes["D"], sizes["I"]
        inner_k = slope["I"] / k
        outputs_k = (
            round((slope["k"] - inner_k * inner - 44) / hidden) if wide != "inner" else 4.0 * (1 if slope["I"] else 0)
        )
        hidden_1 = slope["D"] - k * outputs_k
        queries, keys = slope["H"] / sizes["C"], slope["G"] / sizes["C"]
        known = hidden_1 * hidden + k * (inner_k * inner + outputs_k * hidden) + slope["E"] * sizes["E"]
        rest = value - known - queries * sizes["H"] * sizes["C"] - keys * sizes["G"] * sizes["C"]
        rows[name] = [round(x, 2) for x in (hidden_1, inner_k, outputs_k, queries, keys, slope["E"], rest)]
    return rows


def main() -> None:
    """Measure and print every mode and shape."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = {}
    for mode in sys.argv[1:] or MODES:
        result[mode] = {wide: moment(wide, mode) for wide in WIDE}
        for wide, rows in result[mode].items():
            for name, row in rows.items():
                print(f"{mode:<11} wide {wide:<8} {name:<9} {row}", flush=True)
    print(json.dumps({"name": "layer_bytes", **result}))


if __name__ == "__main__":
    main()
