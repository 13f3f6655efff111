"""One parent forward, and beside it, layer by layer, every block that could take a layer's place.

For a block b at a layer whose parent takes the residual stream x to m (behind attention) and m to y (behind experts):

    loss_b = sum (y - y_b)^2 / sum y^2      = MSE(parent_out, child_out) / MSE(parent_out, 0), over counted tokens

x, m and y are the parent's; y_b is the block's. A block with the parent's attention starts from m, since there it is
the parent; an attention half that trains apart is compared with m. The second sum is over all processes; the first
is local, so that gradients add up over them.

Expert and router rows of a block are laid over the parent's for the time that it runs, and the router cannot choose
the experts that are not kept (`lit_puzzle.library.swap`): the other experts are the parent's very tensors.

Memory: three states (B, T, D) of one layer, and one block's graph, which ends before the next begins, whatever the
number of blocks and layers; + a copy of each tensor whose rows are laid over (a router; experts only if they train).
Traffic: 16 bytes a layer. Reads and writes: nothing. Source: arXiv 2411.19146 (blockwise local distillation).

Shapes: B rows, T tokens of a row, D hidden channels, N tokens that count.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from lit_puzzle.data.packing import model_inputs
from lit_puzzle.distill.blocks_to_train import BlockToTrain
from lit_puzzle.distill.objective import targets_before
from lit_puzzle.library.swap import swapped
from lit_puzzle.model.gpt_oss import GptOssPuzzleForCausalLM
from lit_puzzle.model.layout import EXPERT_ROWS
from lit_puzzle.spec import BlockSpec

Batch = Mapping[str, Tensor]


class States(NamedTuple):
    """The parent's residual stream at one layer, each (B, T, D): entering, behind attention, behind experts."""

    enters: Tensor
    middle: Tensor
    leaves: Tensor


class Surroundings(NamedTuple):
    """What decoder layers are told beside hidden states: masks by window, rotation, positions; tokens that count."""

    masks: dict[int | None, Any]
    rotation: tuple[Tensor, Tensor]
    positions_BT: Tensor
    counted_BT: Tensor


class BlockError(NamedTuple):
    """`error`: sum of squares over this process's tokens, with a graph; `norm`: of the parent, over all processes."""

    block: "TrainedBlock"
    error: Tensor
    norm: Tensor


class TrainedBlock(nn.Module):
    """The tensors of one block that train, in float32 or more; nothing else of the block exists.

    Args:
        what: The block.
        tensors: Initial values by name inside the layer, expert and router tensors with the kept rows only.
    """

    def __init__(self, what: BlockToTrain, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.what = what
        for name, tensor in tensors.items():
            master = torch.promote_types(tensor.dtype, torch.float32)
            values = tensor.detach().to(master, copy=True, memory_format=torch.contiguous_format)
            self.register_parameter(_inside(name), nn.Parameter(values))

    def tensors(self) -> dict[str, Tensor]:
        """What trains, by name inside the layer."""
        return {name: self.get_parameter(_inside(name)) for name in self.what.tensors}

    def forward(self, decoder: Any, states: States, around: Surroundings) -> Tensor:
        """The squared error of the block, summed over the counted tokens of this process.

        Args:
            decoder: The parent's layer, gathered, with the block swapped in but for its tensors.
            states: The parent's.
            around: Masks and positions.
        """
        laid = {name: self._laid_over(decoder.get_parameter(name), name) for name in self.what.tensors}
        hidden_BTD, target_BTD = states.middle, states.leaves
        if self.what.attention:
            window = self.what.block.window_tokens
            hidden_BTD = attention_half(decoder, states.enters, around, window, laid)
        if self.what.experts:
            hidden_BTD = expert_half(decoder, hidden_BTD, laid)
        else:
            target_BTD = states.middle
        return squares(hidden_BTD[around.counted_BT], target_BTD[around.counted_BT])

    def _laid_over(self, parent: Tensor, name: str) -> Tensor:
        trained = self.get_parameter(_inside(name)).to(parent.dtype)
        kept = self.what.block.experts
        if name not in EXPERT_ROWS or len(kept) == len(parent):
            return trained
        return parent.detach().index_copy(0, torch.tensor(kept, device=parent.device), trained)


def _inside(name: str) -> str:
    """A name inside a layer as that of a parameter, which cannot hold dots."""
    return name.replace(".", "/")


def attention_half(
    decoder: Any, hidden_BTD: Tensor, around: Surroundings, window: int | None, tensors: Mapping[str, Tensor]
) -> Tensor:
    """The residual stream behind the attention of a layer, with some of its tensors exchanged."""
    normed_BTD = _call(decoder, "input_layernorm", tensors, hidden_BTD)
    change_BTD, _ = _call(
        decoder,
        "self_attn",
        tensors,
        hidden_states=normed_BTD,
        attention_mask=around.masks[window],
        position_embeddings=around.rotation,
        position_ids=around.positions_BT,
    )
    return hidden_BTD + change_BTD


def expert_half(decoder: Any, hidden_BTD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The residual stream behind the experts of a layer, with some of its tensors exchanged."""
    change_BTD, _ = _call(decoder, "mlp", tensors, _call(decoder, "post_attention_layernorm", tensors, hidden_BTD))
    return hidden_BTD + change_BTD


def _call(decoder: nn.Module, part: str, tensors: Mapping[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
    """Calls a part of a layer, never the layer itself: what gathers it before and frees it after is not for us."""
    own = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
    return functional_call(decoder.get_submodule(part), own, arguments, keywords)


def squares(child_ND: Tensor, parent_ND: Tensor | None = None) -> Tensor:
    """Sum of the squared differences (or, of one tensor, of its squares), in float32 or more."""
    exact = torch.promote_types(child_ND.dtype, torch.float32)
    difference_ND = child_ND.to(exact) if parent_ND is None else child_ND.to(exact) - parent_ND.to(exact)
    return difference_ND.square().sum()


def counted_tokens(batch: Batch, completions_only: bool) -> Tensor:
    """(B, T): all real tokens, or only those from which the parent wrote the next one."""
    return targets_before(batch) if completions_only else batch["document_ids"] >= 0


def surroundings(
    parent: GptOssPuzzleForCausalLM, batch: Batch, counted_BT: Tensor, blocks: Sequence[BlockToTrain]
) -> Surroundings:
    """Masks of the parent's windows and of those of the blocks; positions of the packed documents."""
    positions_BT = model_inputs(parent, batch)["position_ids"]
    body: Any = parent.model
    some_BTD = body.embed_tokens(batch["input_ids"])
    masks = body.attention_masks(some_BTD, None, None, positions_BT)
    for block in blocks:
        window = block.block.window_tokens
        if window not in masks:
            experts = tuple(range(body.layers[block.layer].mlp.router.num_experts))
            with swapped(parent, block.layer, BlockSpec(experts, window)):
                masks |= body.attention_masks(some_BTD, None, None, positions_BT)
    return Surroundings(masks, body.rotary_emb(some_BTD, positions_BT), positions_BT, counted_BT)


def block_errors(
    parent: GptOssPuzzleForCausalLM,
    blocks: Sequence[TrainedBlock],
    batch: Batch,
    counted_BT: Tensor,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Iterator[BlockError]:
    """Runs the parent once and every block at its layer; whoever iterates runs backward before the next.

    Args:
        parent: Frozen, in evaluation mode; where its layers are sharded, each is gathered once.
        blocks: In the order of the layers.
        batch: `input_ids` and `position_ids`, each (B, T).
        counted_BT: Tokens whose error counts; one at least, on some process.
        sum_over_processes: Adds a tensor up over processes.
    """
    body: Any = parent.model
    with torch.no_grad():
        around = surroundings(parent, batch, counted_BT, [block.what for block in blocks])
        hidden_BTD = body.embed_tokens(batch["input_ids"])
    own_windows = [block["sliding_window"] for block in parent.config.block_configs]
    for layer in range(blocks[-1].what.layer + 1):
        decoder = body.layers[layer]
        if isinstance(decoder, FSDPModule):
            decoder.unshard()
        with torch.no_grad():
            middle_BTD = attention_half(decoder, hidden_BTD, around, own_windows[layer], {})
            leaves_BTD = expert_half(decoder, middle_BTD, {})
            norms = torch.stack([squares(state[around.counted_BT]) for state in (middle_BTD, leaves_BTD)])
        here = [block for block in blocks if block.what.layer == layer]
        norm_of_half, norm = sum_over_processes(norms.double()) if here else norms
        states = States(hidden_BTD, middle_BTD, leaves_BTD)
        for block in here:
            with swapped(parent, layer, block.what.block):
                yield BlockError(block, block(decoder, states, around), norm if block.what.experts else norm_of_half)
        if isinstance(decoder, FSDPModule):
            decoder.reshard()
        hidden_BTD = leaves_BTD
