"""A loaded model whose layers each have a block of their own in the configuration, so that one of them can be changed.

Reads and writes nothing; nothing is copied. Source: arXiv 2602.11937 section 2 (experts and windows per layer).
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from lit_puzzle.model.gpt_oss import Block, GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.model.layout import layer_blocks


def with_own_blocks(model: PreTrainedModel) -> GptOssPuzzleForCausalLM:
    """The same modules as a model whose layers have a window each in the configuration, so that one can be changed.

    A model of that kind is returned as it is; of a stock one the modules move, nothing is copied.
    """
    if isinstance(model, GptOssPuzzleForCausalLM):
        return model
    blocks: list[Block] = [
        {"num_local_experts": experts, "sliding_window": window}
        for experts, window in layer_blocks(model.config.to_dict())
    ]
    config = GptOssPuzzleConfig.from_gpt_oss(model.config, blocks)
    with torch.device("meta"):
        puzzle = GptOssPuzzleForCausalLM(config)
    puzzle.model.embed_tokens, puzzle.model.norm = model.model.embed_tokens, model.model.norm
    puzzle.model.rotary_emb, puzzle.model.layers = model.model.rotary_emb, model.model.layers
    puzzle.lm_head = model.lm_head
    for layer in range(len(blocks)):
        decoder: Any = puzzle.model.layers[layer]
        decoder.self_attn.config = decoder.mlp.experts.config = puzzle.config
    puzzle.generation_config = model.generation_config
    return puzzle.train(model.training)


def set_blocks(config: GptOssPuzzleConfig, blocks: list[Block]) -> None:
    """Gives a configuration other blocks, in place: the object is shared by all layers and by `generate`."""
    config.block_configs = blocks
    config.layer_types = [
        "full_attention" if block["sliding_window"] is None else "sliding_attention" for block in blocks
    ]
    config.per_layer_config = dict(enumerate(blocks))
