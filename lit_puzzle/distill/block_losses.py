"""Losses of blocks: one forward pass of the parent, and at each layer a forward pass of every block of that layer.

For a block b at a layer whose parent maps the residual stream x to m (behind attention) and m to y (behind experts):

    loss_b = sum (y - y_b)^2 / sum y^2      = MSE(parent_out, child_out) / MSE(parent_out, 0), over counted tokens

x, m and y are the parent's; y_b is the block's. A block with the parent's attention starts from m, because its own m
would be the same; an attention half that trains apart is compared with m. The sum of y^2 is over all processes; the
error is that of this process, so that gradients add up over processes.

While a block runs, its expert and router rows overwrite those rows in copies of the parent's tensors, and the router
cannot choose experts that are not kept (`lit_puzzle.library.swap`). Experts that do not train are the parent's tensors
themselves.

Memory: three states (B, T, D) of one layer, and the graph of one block, which is freed before the next block runs; + a
copy of each tensor with overwritten rows (a router; experts only if they train).
Traffic: 16 bytes a layer. Reads and writes nothing. Source: arXiv 2411.19146 (blockwise local distillation).

Shapes: B rows, T tokens of a row, D hidden channels, N counted tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.data.packing import model_inputs
from lit_puzzle.distill.block_selection import SelectedBlock
from lit_puzzle.distill.distillation_loss import targets_before
from lit_puzzle.library.swap import swapped
from lit_puzzle.model.blocks import PuzzleModel
from lit_puzzle.model.family import LayerNames
from lit_puzzle.model.modules import decoder_layer, model_family, router_of
from lit_puzzle.spec import BlockSpec


class States(NamedTuple):
    """The parent's residual stream at one layer, each (B, T, D): entering, behind attention, behind experts."""

    enters: Tensor
    middle: Tensor
    leaves: Tensor


class LayerInputs(NamedTuple):
    """Inputs of decoder layers beside hidden states (masks by window, rotation, positions), and the counted tokens."""

    masks: dict[int | None, Any]
    rotation: tuple[Tensor, Tensor]
    positions_BT: Tensor
    counted_BT: Tensor


class BlockError(NamedTuple):
    """The error of a block, with a graph, over this process's tokens; the norm of the parent over all processes'."""

    block: "TrainableBlock"
    error: Tensor
    norm: Tensor


class TrainableBlock(nn.Module):
    """The tensors of one block that train, in float32 or more; its other tensors are the parent's.

    Args:
        selected: the block.
        tensors: initial values by name inside the layer; expert and router tensors have the kept rows only.
        names: names of the parts of a layer of the parent's family.
    """

    def __init__(self, selected: SelectedBlock, tensors: Mapping[str, Tensor], names: LayerNames) -> None:
        super().__init__()
        self.selected, self.names = selected, names
        for name, tensor in tensors.items():
            master = torch.promote_types(tensor.dtype, torch.float32)
            values = tensor.detach().to(master, copy=True, memory_format=torch.contiguous_format)
            self.register_parameter(_parameter_name(name), nn.Parameter(values))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that train, by name inside the layer."""
        return {name: self.get_parameter(_parameter_name(name)) for name in self.selected.tensors}

    def forward(self, decoder: Any, states: States, inputs: LayerInputs) -> Tensor:
        """Return the squared error of the block, summed over the counted tokens of this process.

        Args:
            decoder: the parent's layer, gathered, with the block's experts and window swapped in.
            states: states of the parent.
            inputs: masks, rotation, positions and counted tokens.
        """
        replaced = {name: self._over(decoder.get_parameter(name), name) for name in self.selected.tensors}
        hidden_BTD, target_BTD = states.middle, states.leaves
        if self.selected.attention:
            window = self.selected.block.window_tokens
            hidden_BTD = attention_half(decoder, self.names, states.enters, inputs, window, replaced)
        if self.selected.experts:
            hidden_BTD = expert_half(decoder, self.names, hidden_BTD, replaced)
        else:
            target_BTD = states.middle
        return squares(hidden_BTD[inputs.counted_BT], target_BTD[inputs.counted_BT])

    def _over(self, parent: Tensor, name: str) -> Tensor:
        """Return the block's tensor, with the parent's rows where experts are not kept."""
        trained = self.get_parameter(_parameter_name(name)).to(parent.dtype)
        kept = self.selected.block.experts
        if name not in self.names.expert_rows or len(kept) == len(parent):
            return trained
        return parent.detach().index_copy(0, torch.tensor(kept, device=parent.device), trained)


def _parameter_name(name: str) -> str:
    """Return a name inside a layer as name of a parameter, which cannot contain dots."""
    return name.replace(".", "/")


def attention_half(
    decoder: Any,
    names: LayerNames,
    hidden_BTD: Tensor,
    inputs: LayerInputs,
    window: int | None,
    tensors: Mapping[str, Tensor],
) -> Tensor:
    """Return the residual stream behind the attention of a layer, with some of its tensors replaced."""
    normed_BTD = _call(decoder, names.attention_norm, tensors, hidden_BTD)
    change_BTD, _ = _call(
        decoder,
        names.attention,
        tensors,
        hidden_states=normed_BTD,
        attention_mask=inputs.masks[window],
        position_embeddings=inputs.rotation,
        position_ids=inputs.positions_BT,
    )
    return hidden_BTD + change_BTD


def expert_half(decoder: Any, names: LayerNames, hidden_BTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the residual stream behind the experts of a layer, with some of its tensors replaced."""
    normed_BTD = _call(decoder, names.moe_norm, tensors, hidden_BTD)
    change_BTD, _ = _call(decoder, names.moe, tensors, normed_BTD)
    return hidden_BTD + change_BTD


def _call(decoder: nn.Module, part: str, tensors: Mapping[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
    """Call a part of a layer; calling the layer itself would run FSDP's hooks, which gather and free it."""
    own = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
    return functional_call(decoder.get_submodule(part), own, arguments, keywords)


def squares(child_ND: Tensor, parent_ND: Tensor | None = None) -> Tensor:
    """Return the sum of the squared differences (of one tensor: of its squares), in float32 or more."""
    exact = torch.promote_types(child_ND.dtype, torch.float32)
    difference_ND = child_ND.to(exact) if parent_ND is None else child_ND.to(exact) - parent_ND.to(exact)
    return difference_ND.square().sum()


def counted_tokens(batch: PackedBatch, completions_only: bool) -> Tensor:
    """Return (B, T): all tokens of documents, or only those before generated tokens."""
    return targets_before(batch) if completions_only else batch["document_ids"] >= 0


def layer_inputs(
    parent: PuzzleModel, batch: PackedBatch, counted_BT: Tensor, blocks: Sequence[SelectedBlock]
) -> LayerInputs:
    """Return masks of the parent's windows and of those of the blocks, and positions of the packed documents."""
    positions_BT = model_inputs(parent, batch)["position_ids"]
    body: Any = parent.model
    embedded_BTD = body.embed_tokens(batch["input_ids"])
    masks = body.attention_masks(embedded_BTD, None, None, positions_BT)
    for block in blocks:
        window = block.block.window_tokens
        if window not in masks:
            router = router_of(decoder_layer(parent, block.layer), model_family(parent))
            experts = tuple(range(router.num_experts))
            with swapped(parent, block.layer, BlockSpec(experts, window)):
                masks |= body.attention_masks(embedded_BTD, None, None, positions_BT)
    return LayerInputs(masks, body.rotary_emb(embedded_BTD, positions_BT), positions_BT, counted_BT)


def block_errors(
    parent: PuzzleModel,
    blocks: Sequence[TrainableBlock],
    batch: PackedBatch,
    counted_BT: Tensor,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Iterator[BlockError]:
    """Run the parent once and every block at its layer, and yield their errors.

    The caller runs backward on an error before it requests the next one, so that one graph is in memory at a time.

    Args:
        parent: the parent, frozen, in evaluation mode; sharded layers are gathered once each.
        blocks: the blocks, in the order of their layers.
        batch: packed batch.
        counted_BT: tokens whose error counts; at least one, on some process.
        sum_over_processes: returns the sum of a tensor over all processes.
    """
    body: Any = parent.model
    with torch.no_grad():
        inputs = layer_inputs(parent, batch, counted_BT, [block.selected for block in blocks])
        hidden_BTD = body.embed_tokens(batch["input_ids"])
    for layer in range(blocks[-1].selected.layer + 1):
        decoder = body.layers[layer]
        if isinstance(decoder, FSDPModule):
            decoder.unshard()
        states = parent_states(parent, layer, hidden_BTD, inputs)
        here = [block for block in blocks if block.selected.layer == layer]
        yield from layer_errors(parent, here, states, inputs, sum_over_processes)
        if isinstance(decoder, FSDPModule):
            decoder.reshard()
        hidden_BTD = states.leaves


@torch.no_grad()
def parent_states(parent: PuzzleModel, layer: int, hidden_BTD: Tensor, inputs: LayerInputs) -> States:
    """Return the states of the parent at a layer, from those that enter it."""
    middle_BTD = parent_middle(parent, layer, hidden_BTD, inputs)
    names = model_family(parent).layer
    return States(hidden_BTD, middle_BTD, expert_half(decoder_layer(parent, layer), names, middle_BTD, {}))


@torch.no_grad()
def parent_middle(parent: PuzzleModel, layer: int, hidden_BTD: Tensor, inputs: LayerInputs) -> Tensor:
    """Return the state of the parent behind the attention of a layer, from the one that enters it."""
    names, window = model_family(parent).layer, parent.config.block_configs[layer]["sliding_window"]
    return attention_half(decoder_layer(parent, layer), names, hidden_BTD, inputs, window, {})


def layer_errors(
    parent: PuzzleModel,
    blocks: Sequence[TrainableBlock],
    states: States,
    inputs: LayerInputs,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Iterator[BlockError]:
    """Yield the errors of the blocks of one layer, which has its weights; arguments as for `block_errors`."""
    if not blocks:
        return
    with torch.no_grad():
        norms = torch.stack([squares(state[inputs.counted_BT]) for state in (states.middle, states.leaves)])
    norm_of_half, norm = sum_over_processes(norms.double())
    for block in blocks:
        selected = block.selected
        with swapped(parent, selected.layer, selected.block):
            error = block(decoder_layer(parent, selected.layer), states, inputs)
            yield BlockError(block, error, norm if selected.experts else norm_of_half)
