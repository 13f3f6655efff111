"""One pass of a streamed model over batches, layer by layer: every layer is read once, for all batches.

The states between two layers are in mapped files (`lit_puzzle.model.state_files`), so that a pass that was killed goes
on with the layer at which it stopped, to the same bits. A stage iterates over the layers and runs every batch through
each:

    for at in LayerPass(source, folder, batches, computing):
        for index in range(len(batches)):
            at.run(index)
        (save what was found in layer at.layer; the pass counts the layer as done when the next one is asked for)

A batch is padded (`input_ids`, `attention_mask`) or packed (`input_ids`, `position_ids`), each (B, T).

Disk: 2 files of tokens x channels numbers. Memory: that of `lit_puzzle.model.memory_budget`, and the batches.
Shapes: B sequences of a batch, T tokens of the longest, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_puzzle.model.blocks import PuzzleModel
from lit_puzzle.model.state_files import StateFiles, hash_of
from lit_puzzle.model.streaming import LayerSource

Batch = Mapping[str, Tensor]
PARENT = "parent"  # name of the states of the model itself


class LayerInputs(NamedTuple):
    """Inputs of decoder layers beside hidden states: masks by window, rotation, positions."""

    masks: dict[int | None, Any]
    rotation: tuple[Tensor, Tensor]
    positions_BT: Tensor


def layer_inputs(model: PuzzleModel, hidden_BTD: Tensor, batch: Batch) -> LayerInputs:
    """Return what the layers of a model need beside the hidden states of a batch, padded or packed."""
    body: Any = model.model
    if "position_ids" in batch:
        positions_BT = batch["position_ids"].to(hidden_BTD.device)
        masks = body.attention_masks(hidden_BTD, None, None, positions_BT)
    else:
        positions_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        masks = body.attention_masks(hidden_BTD, batch["attention_mask"].to(hidden_BTD.device), None, None)
    return LayerInputs(masks, body.rotary_emb(hidden_BTD, positions_BT), positions_BT)


def run_layer(model: PuzzleModel, layer: int, hidden_BTD: Tensor, inputs: LayerInputs) -> Tensor:
    """Run hidden states through one decoder layer."""
    result: Tensor = model.model.layers[layer](
        hidden_BTD,
        attention_mask=inputs.masks[model.config.block_configs[layer]["sliding_window"]],
        position_embeddings=inputs.rotation,
        position_ids=inputs.positions_BT,
    )
    return result


class LayerPass:
    """The layers of a model in turn, each with its weights.

    Args:
        source: the model, streamed or in memory.
        folder: where the states between layers are kept.
        batches: all batches of this process.
        computing: bytes of activations of the stage, beside those of a layer's forward pass.

    Raises:
        ValueError: the budget is too small for one layer and a batch.
    """

    def __init__(self, source: LayerSource, folder: Path, batches: Sequence[Batch], computing: int = 0) -> None:
        self.source, self.batches = source, batches
        sizes = [batch["input_ids"].numel() for batch in batches]
        self.ends = torch.tensor(sizes).cumsum(0).tolist()
        self.ahead = source.reads_ahead(computing + _forward_bytes(source, batches))
        config = source.model.config
        self.num_layers: int = config.num_hidden_layers
        self.states = StateFiles(folder, sum(sizes), config.hidden_size, source.model.dtype, hash_of(batches))

    @property
    def done(self) -> int:
        """Number of layers that are done."""
        return self.states.layer_of(PARENT) or 0

    def restart(self) -> None:
        """Forget the layers that are done."""
        self.states.remove(PARENT)
        self.embed()

    def __iter__(self) -> Iterator[LayerAtWork]:
        """Yield the layers that are not done yet."""
        self.embed()
        for layer, decoder in self.source.layers(self.done, self.num_layers, self.ahead):
            with self.states.write(PARENT, layer + 1) as leaving_ND:
                yield LayerAtWork(self, layer, decoder, self.states.read(PARENT, layer), leaving_ND)
            self.states.remove(PARENT, but=[layer + 1])

    def embed(self) -> None:
        """Write the states that enter the first layer, unless there are states already."""
        if self.states.layer_of(PARENT) is not None:
            return
        with torch.no_grad(), self.states.write(PARENT, 0) as hidden_ND:
            for index, batch in enumerate(self.batches):
                ids_BT = batch["input_ids"].to(self.source.device)
                hidden_ND[self.tokens(index)] = self.source.model.model.embed_tokens(ids_BT).flatten(0, 1).cpu()

    @torch.no_grad()
    def through(self, layer: int, entering_ND: Tensor, index: int) -> Tensor:
        """Return the states of a batch behind a layer that has its weights, (B, T, D)."""
        hidden_BTD = self.on_device(entering_ND, index)
        inputs = layer_inputs(self.source.model, hidden_BTD, self.batches[index])
        return run_layer(self.source.model, layer, hidden_BTD, inputs)

    def tokens(self, index: int) -> slice:
        """Return the rows of a batch in the states."""
        return slice(self.ends[index - 1] if index else 0, self.ends[index])

    @torch.no_grad()
    def final(self, index: int, name: str = PARENT, mask_BT: Tensor | None = None) -> Tensor:
        """Return the states of a batch behind the last layer and the last norm.

        Args:
            index: index of the batch; all layers must be done.
            name: name of the states.
            mask_BT: boolean, the tokens that are returned, as (N, D); None: all, as (B, T, D).
        """
        hidden_BTD = self.on_device(self.states.read(name, self.num_layers), index)
        norm: Any = self.source.model.model.norm
        result: Tensor = norm(hidden_BTD if mask_BT is None else hidden_BTD[mask_BT.to(hidden_BTD.device)])
        return result

    def on_device(self, states_ND: Tensor, index: int) -> Tensor:
        """Return the states of a batch, (B, T, D), copied to the device."""
        shape = (*self.batches[index]["input_ids"].shape, -1)
        return states_ND[self.tokens(index)].view(shape).to(self.source.device, copy=True)


class LayerAtWork:
    """One layer of a pass, with its weights.

    Attributes:
        layer: its index.
        decoder: the layer.
    """

    def __init__(self, whole: LayerPass, layer: int, decoder: Any, entering_ND: Tensor, leaving_ND: Tensor) -> None:
        self.layer, self.decoder = layer, decoder
        self._whole, self._entering_ND, self._leaving_ND = whole, entering_ND, leaving_ND

    def run(self, index: int) -> None:
        """Run one batch through the layer and keep its states."""
        self._leaving_ND[self._whole.tokens(index)] = self.through(index).flatten(0, 1).cpu()

    @torch.no_grad()
    def through(self, index: int) -> Tensor:
        """Return the states of a batch that leave the layer as it is now, (B, T, D)."""
        return self._whole.through(self.layer, self._entering_ND, index)

    def leaving(self, index: int) -> Tensor:
        """Return the states of a batch that `run` has kept, (B, T, D)."""
        return self._whole.on_device(self._leaving_ND, index)


def _forward_bytes(source: LayerSource, batches: Sequence[Batch]) -> int:
    """Return the bytes of the activations of the forward pass of the largest batch through a layer."""
    sizes = [(batch["input_ids"].numel(), batch["input_ids"].shape[-1]) for batch in batches]
    return max((source.forward_bytes(*size) for size in sizes), default=0)
