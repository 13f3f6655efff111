"""A stock gpt-oss of 8 layers of 50 MB in bfloat16, for tests of budgets of memory."""

from pathlib import Path

import torch
from transformers import GptOssConfig, GptOssForCausalLM

LAYERS = 8


def write_parent(folder: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 32, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024}
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_experts_per_tok=2)).bfloat16()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(0, 2**13)  # small finite values; quicker than drawing normals
    model.save_pretrained(folder)
