"""Puts one candidate into a loaded parent, in place, and takes it out again bit for bit.

Kept experts: the router masks the logits of the others to -inf before top-k, which is exactly the pruned layer; expert
tensors stay where they are and nothing is copied. Window: the layer's attention and its entry in the configuration,
which makes its mask and sizes its KV cache. Trained tensors: copied into the parameters; what they replace is kept
aside. All of it works on parameters sharded over processes as on whole ones.

Reads safetensors files of trained candidates; writes nothing. Source: arXiv 2602.11937 section 4 (replace one block).
Memory: twice the bytes of the candidate's trained tensors (of this process's share, when sharded), else nothing.

Shapes: N tokens, E experts, K chosen of a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_puzzle.library.library import Candidate
from lit_puzzle.model.blocks import set_blocks
from lit_puzzle.model.gpt_oss import GptOssPuzzleForCausalLM
from lit_puzzle.model.layout import EXPERT_ROWS, layer_shapes
from lit_puzzle.model.safetensors_file import SafetensorsFile
from lit_puzzle.spec import BlockSpec

RouterOutput = tuple[Tensor, Tensor, Tensor]


@contextmanager
def swapped(
    model: GptOssPuzzleForCausalLM, layer: int, block: BlockSpec, trained: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """The model with `block` in place of layer `layer` inside; afterwards everything is as before, bit for bit.

    Args:
        model: The parent (see `with_own_blocks`), sharded or not, in no gathered state.
        layer: Index of the layer.
        block: What it becomes.
        trained: Tensors of the layer by their name inside it, expert tensors with the kept rows only.
    """
    decoder = _decoder(model, layer)
    with ExitStack() as stack:
        if block.num_experts < decoder.mlp.router.num_experts:
            stack.enter_context(_kept_experts(decoder.mlp.router, block.experts))
        if block.window_tokens != decoder.self_attn.sliding_window:
            stack.enter_context(_window(model, layer, block.window_tokens))
        for name, tensor in (trained or {}).items():
            rows = block.experts if name in EXPERT_ROWS else None
            stack.enter_context(_written(decoder.get_parameter(name), tensor, rows))
        yield


def _decoder(model: GptOssPuzzleForCausalLM, layer: int) -> Any:
    """A decoder layer; transformers' modules have no types."""
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
def _written(parameter: Tensor, values: Tensor, rows: Sequence[int] | None) -> Iterator[None]:
    """Values in some rows (None: all) of a parameter; of a sharded one, in those rows that this process holds."""
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
    """This process's rows of a parameter, sharing its memory, and the index of the first."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    mesh = parameter.device_mesh
    share = -(-len(parameter) // mesh.size())  # as FSDP2 cuts: torch.chunk
    return parameter.to_local().detach(), mesh.get_local_rank() * share


def trained_tensors(folder: Path, candidate: Candidate) -> dict[str, Tensor]:
    """The trained tensors of a candidate, as views of its mapped file; none for a candidate that is only cut."""
    if candidate.weights is None:
        return {}
    file = SafetensorsFile(folder / candidate.weights)
    return {name: file.read(name) for name in file.tensors}


def check_trained(folder: Path, config: Mapping[str, Any], candidate: Candidate) -> None:
    """Refuses trained tensors that are not of the candidate's layer, by the header of their file.

    Raises:
        ValueError: A tensor that the layer has not, or of another shape; the message names it.
    """
    if candidate.weights is None:
        return
    shapes = layer_shapes(config, candidate.block.num_experts, mxfp4=False)
    for name, info in SafetensorsFile(folder / candidate.weights).tensors.items():
        if name not in shapes:
            raise ValueError(f"{folder / candidate.weights}: no layer has a tensor {name}; allowed: {sorted(shapes)}")
        if tuple(info.shape) != shapes[name]:
            raise ValueError(
                f"{folder / candidate.weights}: {name} has shape {tuple(info.shape)}; a layer with "
                f"{candidate.block.num_experts} experts needs {shapes[name]}"
            )
