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

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_puzzle.model.blocks import PuzzleModel, set_blocks
from lit_puzzle.model.modules import attention_of, decoder_layer, model_family, restricted, router_of
from lit_puzzle.spec import BlockSpec


@contextmanager
def swapped(
    model: PuzzleModel, layer: int, block: BlockSpec, trained: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Replace one layer by `block` inside the `with` statement; afterwards the model is as before, bit for bit.

    Args:
        model: the parent (see `with_own_blocks`), sharded or not, but not gathered.
        layer: index of the layer.
        block: the block that replaces it.
        trained: tensors of the layer by their names inside it, expert tensors with the kept rows only.
    """
    decoder, family = decoder_layer(model, layer), model_family(model)
    router = router_of(decoder, family)
    with ExitStack() as stack:
        if block.num_experts < router.num_experts:
            stack.enter_context(restricted(router, block.experts))
        if block.window_tokens != attention_of(decoder, family).sliding_window:
            stack.enter_context(_window(model, layer, block.window_tokens))
        for name, tensor in (trained or {}).items():
            rows = block.experts if name in family.layer.expert_rows else None
            stack.enter_context(_overwritten(decoder.get_parameter(name), tensor, rows))
        yield


@contextmanager
def _window(model: PuzzleModel, layer: int, window: int | None) -> Iterator[None]:
    attention = attention_of(decoder_layer(model, layer), model_family(model))
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
