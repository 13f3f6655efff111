"""Small heterogeneous checkpoint folders that vLLM's CPU kernels can compute: head_dim 32, sizes that 32 divides."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.model.mxfp4 import quantize_experts

TINY_CHILD = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_child"
TOKENIZER_FILES = ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
BLOCKS: list[dict[str, int | None]] = [
    {"num_local_experts": 4, "sliding_window": None},
    {"num_local_experts": 8, "sliding_window": 24},
    {"num_local_experts": 1, "sliding_window": 40},  # fewer than top-k
    {"num_local_experts": 6, "sliding_window": None},
]


def write_folder(folder: Path, seed: int = 0, mxfp4: bool = False, scales: bool = False, **settings: Any) -> Path:
    """Write a folder with random weights and the tiny child's tokenizer; return the folder.

    Args:
        folder: folder to write.
        seed: seed of the weights.
        mxfp4: whether experts are stored in MXFP4 and everything else in bfloat16.
        scales: whether there are KV scales, all different and none a power of two.
        settings: entries of the configuration.
    """
    config = GptOssPuzzleConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_hidden_layers": len(BLOCKS),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts_per_tok": 2,
            "vocab_size": 128,
            "block_configs": BLOCKS,
            "eos_token_id": 5,
            "pad_token_id": 0,
            "dtype": "bfloat16" if mxfp4 else "float32",
            "architectures": ["GptOssPuzzleForCausalLM"],
            **({"quantization_config": {"quant_method": "mxfp4"}} if mxfp4 else {}),
            **settings,
        }
    )
    folder.mkdir(parents=True)
    save_file(tensors(config, seed, mxfp4, scales), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    for name in TOKENIZER_FILES:
        shutil.copy(TINY_CHILD / name, folder / name)
    return folder


def tensors(config: GptOssPuzzleConfig, seed: int, mxfp4: bool = False, scales: bool = False) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint; biases, sinks and norms are random too."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, parameter in GptOssPuzzleForCausalLM(config).state_dict().items():
        centre, spread = (1.0, 0.1) if "norm" in name else (0.0, 0.2)
        value = centre + spread * torch.randn(parameter.shape, generator=generator)
        if mxfp4 and name.endswith(("gate_up_proj", "down_proj")):
            made[f"{name}_blocks"], made[f"{name}_scales"] = quantize_experts(value)
        else:
            made[name] = value.to(torch.bfloat16 if mxfp4 else torch.float32)
    for layer in range(config.num_hidden_layers if scales else 0):
        made[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(0.011 * (layer + 1))
        made[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor(0.007 * (layer + 1))
    return made
