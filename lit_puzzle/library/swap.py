"""Swap one block of a loaded parent in place, and restore the parent bit for bit afterwards.

- Kept experts: the router masks the logits of the other experts to -inf before top-k, which gives exactly the pruned
  layer. The expert tensors are neither moved nor copied.
- Window: set on the layer's attention and in its entry of the configuration, from which the mask and the size of the
  KV cache follow.
- Trained tensors: copied into the parameters; the values that they replace are kept and copied back.

Parameters may be whole or sharded over processes. Reads and writes no files.
Source: arXiv 2602.11937 section 4 (replace one block).
Memory: twice the bytes of the candidate's trained tensors (of this process's share, when sharded), else nothing.

Shapes: N tokens, E experts, K chosen of a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_puzzle.model.blocks import set_blocks
from lit_puzzle.model.gpt_oss import GptOssPuzzleForCausalLM
from lit_puzzle.model.layout import EXPERT_ROWS
from lit_puzzle.spec import BlockSpec

RouterOutput = tuple[Tensor, Tensor, Tensor]


@contextmanager
def swapped(
    model: GptOssPuzzleForCausalLM, layer: int, block: BlockSpec, trained: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Replace one layer by `block` inside the `with` statement; afterwards the model is as before, bit for bit.

    Args:
        model: the parent (see `with_own_blocks`), sharded or not, but not gathered.
        layer: index of the layer.
        block: the block that replaces it.
        trained: tensors of the layer by their names inside it, expert tensors with the kept rows only.
    """
    decoder = _decoder(model, layer)
    with ExitStack() as stack:
        if block.num_experts < decoder.mlp.router.num_experts:
            stack.enter_context(_kept_experts(decoder.mlp.router, block.experts))
        if block.window_tokens != decoder.self_attn.sliding_window:
            stack.enter_context(_window(model, layer, block.window_tokens))
        for name, tensor in (trained or {}).items():
            rows = block.experts if name in EXPERT_ROWS else None
            stack.enter_context(_overwritten(decoder.get_parameter(name), tensor, rows))
        yield


def _decoder(model: GptOssPuzzleForCausalLM, layer: int) -> Any:
    """Return a decoder layer; transformers' modules have no types."""
    return model.model.layers[layer]


@contextmanager
def _kept_experts(router: Any, kept: Sequence[int]) -> Iterator[None]:
    removed_E = torch.ones(router.num_experts, dtype=torch.bool, device=router.weight.device)
    removed_E[list(kept)] = False
    top_k = min(router.top_k, len(kept))

    def restrict(_router: Any, _inputs: Any, output: RouterOutput) -> RouterOutput:
        logits_NE = output[0].masked_fill(removed_E, float("-inf"))
        best_NK, experts_NK = torch.topk(logits_NE, top_k, dim=-1)
        return logits_NE, torch.softmax(best_NK, dim=-1, dtype=best_NK.dtype), experts_NK

    handle = router.register_forward_hook(restrict)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _window(model: GptOssPuzzleForCausalLM, layer: int, window: int | None) -> Iterator[None]:
    attention = _decoder(model, layer).self_attn
    before, blocks = attention.sliding_window, model.config.block_configs
    changed = list(blocks)
    changed[layer] = blocks[layer] | {"sliding_window": window}
    attention.sliding_window = window
    set_blocks(model.config, changed)
    try:
        yield
    finally:
        attention.sliding_window = before
        set_blocks(model.config, blocks)


@contextmanager
def _overwritten(parameter: Tensor, values: Tensor, rows: Sequence[int] | None) -> Iterator[None]:
    """Overwrite some rows (None: all) of a parameter; of a sharded one, those rows that this process holds."""
    local, first = _local_rows(parameter)
    wanted = range(len(parameter)) if rows is None else rows
    mine = [place for place, row in enumerate(wanted) if first <= row < first + len(local)]
    places_R = torch.tensor([wanted[place] - first for place in mine], dtype=torch.long, device=local.device)
    before = local.index_select(0, places_R)
    with torch.no_grad():
        local.index_copy_(0, places_R, values[mine].to(local))
    try:
        yield
    finally:
        with torch.no_grad():
            local.index_copy_(0, places_R, before)


def _local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """Return this process's rows of a parameter, sharing its memory, and the index of the first."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    mesh = parameter.device_mesh
    share = -(-len(parameter) // mesh.size())  # as FSDP2 cuts: torch.chunk
    return parameter.to_local().detach(), mesh.get_local_rank() * share
