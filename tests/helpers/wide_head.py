"""A model of one small layer in bfloat16 whose frozen head is large: copies of it are seen in a process's memory."""

from transformers import GptOssConfig, GptOssForCausalLM

VOCABULARY = 2**16
HEAD_BYTES = 2 * 512 * VOCABULARY


def wide_model() -> GptOssForCausalLM:
    sizes = {"hidden_size": 512, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads)).bfloat16().eval().requires_grad_(False)
