"""A child of its own in which one layer really has fewer experts, to test against blocks swapped into the parent."""

from collections.abc import Mapping

from torch import Tensor
from transformers import GptOssForCausalLM

from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.model.layout import layer_prefix
from lit_puzzle.model.surgery import prune_layer
from lit_puzzle.spec import BlockSpec

ALL = tuple(range(8))


def pruned_child(
    parent: GptOssForCausalLM, layer: int, block: BlockSpec, trained: Mapping[str, Tensor] | None = None
) -> GptOssPuzzleForCausalLM:
    """Return the tiny model with one layer pruned.

    Args:
        parent: the tiny model.
        layer: the layer that is replaced.
        block: what it becomes.
        trained: tensors of that layer, named inside it, that take the place of the pruned ones.
    """
    windows = [8, None, 8, None]
    blocks = [{"num_local_experts": 8, "sliding_window": window} for window in windows]
    blocks[layer] = {"num_local_experts": block.num_experts, "sliding_window": block.window_tokens}
    child = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(parent.config, blocks)).eval()
    weights, prefix = parent.state_dict(), layer_prefix(layer)
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    pruned = prune_layer(inside, block.experts, GPT_OSS.layer) | dict(trained or {})
    child.load_state_dict(weights | {prefix + name: tensor for name, tensor in pruned.items()})
    return child
