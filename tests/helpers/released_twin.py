"""A small twin of the released gpt-oss-puzzle-88B folder: its keys, names, MXFP4 experts and KV scales; random weights.

Scaled down: 6 layers for 36, 8 and 4 experts for 128 and 64, windows 4 and 16 for 128 and 8192. Written with the
safetensors library, not with our own writer.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TWIN_BLOCKS: list[dict[str, int | None]] = [
    {"num_local_experts": 8, "sliding_window": 4},
    {"num_local_experts": 8, "sliding_window": None},
    {"num_local_experts": 8, "sliding_window": 4},
    {"num_local_experts": 4, "sliding_window": 16},
    {"num_local_experts": 4, "sliding_window": 4},
    {"num_local_experts": 4, "sliding_window": None},
]

TWIN_CONFIG: dict[str, Any] = {
    "architectures": ["GptOssPuzzleForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "block_configs": TWIN_BLOCKS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "experts_per_token": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "layer_types": ["full_attention" if b["sliding_window"] is None else "sliding_attention" for b in TWIN_BLOCKS],
    "max_position_embeddings": 229376,
    "model_type": "gpt_oss_puzzle",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": 0,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 56.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 4,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128,
}


def twin_tensors(seed: int = 0) -> dict[str, Tensor]:
    """All tensors of the twin; every MXFP4 byte occurs, scales stay in a range that keeps activations small."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = TWIN_CONFIG["hidden_size"], TWIN_CONFIG["intermediate_size"], TWIN_CONFIG["vocab_size"]
    heads, kv_heads, head_dim = 4, 2, 8

    def normal(*shape: int, spread: float = 0.2, centre: float = 0.0) -> Tensor:
        return (centre + spread * torch.randn(*shape, generator=generator)).bfloat16()

    def byte(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    tensors = {"model.embed_tokens.weight": normal(vocab, hidden), "lm_head.weight": normal(vocab, hidden)}
    tensors["model.norm.weight"] = normal(hidden, spread=0.1, centre=1.0)
    for layer, block in enumerate(TWIN_BLOCKS):
        count, prefix = block["num_local_experts"], f"model.layers.{layer}."
        assert count is not None
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = normal(hidden, spread=0.1, centre=1.0)
        for name, rows, columns in (
            ("q", heads * head_dim, hidden),
            ("k", kv_heads * head_dim, hidden),
            ("v", kv_heads * head_dim, hidden),
            ("o", hidden, heads * head_dim),
        ):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, columns)
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = normal(rows)
        tensors[f"{prefix}self_attn.sinks"] = normal(heads)
        tensors[f"{prefix}self_attn.k_scale"] = torch.tensor(2.0 ** -(layer % 3))
        tensors[f"{prefix}self_attn.v_scale"] = torch.tensor(2.0 ** -(layer % 2))
        tensors[f"{prefix}mlp.router.weight"] = normal(count, hidden)
        tensors[f"{prefix}mlp.router.bias"] = normal(count)
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            tensors[f"{prefix}mlp.experts.{name}_blocks"] = byte(0, 256, count, rows, columns // 32, 16)
            tensors[f"{prefix}mlp.experts.{name}_scales"] = byte(121, 126, count, rows, columns // 32)
            tensors[f"{prefix}mlp.experts.{name}_bias"] = normal(count, rows)
    return tensors


def write_released_twin(folder: Path, seed: int = 0) -> Path:
    """Write the twin into `folder`, in two shards with an index, with a generation config."""
    folder.mkdir(parents=True)
    tensors = twin_tensors(seed)
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file_name, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, held in shards.items() for name in held}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(TWIN_CONFIG, indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
