"""One pass of a streamed model over batches, layer by layer: every layer is read once, for all batches.

The states between two layers are in mapped files (`lit_puzzle.model.state_files`), so that a pass that was killed goes
on with the layer at which it stopped, to the same bits. A stage iterates over the layers and runs every batch through
each:

    for at in LayerPass(streamed, folder, batches, computing):
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
from lit_puzzle.model.memory_budget import layer_bytes
from lit_puzzle.model.state_files import StateFiles, hash_of
from lit_puzzle.model.streaming import StreamedModel

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
        streamed: the model.
        folder: where the states between layers are kept.
        batches: all batches of this process.
        computing: bytes of activations of the stage, beside those of a layer's forward pass.

    Raises:
        ValueError: the budget is too small for one layer and a batch.
    """

    def __init__(self, streamed: StreamedModel, folder: Path, batches: Sequence[Batch], computing: int = 0) -> None:
        self.streamed, self.batches = streamed, batches
        sizes = [batch["input_ids"].numel() for batch in batches]
        self.ends = torch.tensor(sizes).cumsum(0).tolist()
        self.ahead = streamed.reads_ahead(computing + forward_bytes(streamed, batches))
        config = streamed.model.config
        self.states = StateFiles(folder, sum(sizes), config.hidden_size, streamed.model.dtype, hash_of(batches))

    @property
    def done(self) -> int:
        """Number of layers that are done."""
        return self.states.layer_of(PARENT) or 0

    def __iter__(self) -> Iterator[LayerAtWork]:
        """Yield the layers that are not done yet."""
        self._embed()
        for layer, decoder in self.streamed.layers(self.done, self.streamed.checkpoint.num_layers, self.ahead):
            with self.states.write(PARENT, layer + 1) as leaving_ND:
                yield LayerAtWork(self, layer, decoder, self.states.read(PARENT, layer), leaving_ND)
            self.states.remove(PARENT, before=layer + 1)

    def _embed(self) -> None:
        if self.states.layer_of(PARENT) is not None:
            return
        with torch.no_grad(), self.states.write(PARENT, 0) as hidden_ND:
            for index, batch in enumerate(self.batches):
                ids_BT = batch["input_ids"].to(self.streamed.device)
                hidden_ND[self.tokens(index)] = self.streamed.model.model.embed_tokens(ids_BT).flatten(0, 1).cpu()

    def tokens(self, index: int) -> slice:
        """Return the rows of a batch in the states."""
        return slice(self.ends[index - 1] if index else 0, self.ends[index])

    def final(self, index: int) -> Tensor:
        """Return the states of a batch behind the last layer and the last norm, (B, T, D), when all layers are done."""
        states_ND = self.states.read(PARENT, self.streamed.checkpoint.num_layers)
        norm: Any = self.streamed.model.model.norm
        with torch.no_grad():
            result: Tensor = norm(self.on_device(states_ND, index))
        return result

    def on_device(self, states_ND: Tensor, index: int) -> Tensor:
        """Return the states of a batch, (B, T, D), copied to the device."""
        shape = (*self.batches[index]["input_ids"].shape, -1)
        return states_ND[self.tokens(index)].view(shape).to(self.streamed.device, copy=True)


class LayerAtWork:
    """One layer of a pass, with its weights.

    Attributes:
        layer: its index.
        decoder: the layer.
    """

    def __init__(self, whole: LayerPass, layer: int, decoder: Any, entering_ND: Tensor, leaving_ND: Tensor) -> None:
        self.layer, self.decoder = layer, decoder
        self._whole, self._entering_ND, self._leaving_ND = whole, entering_ND, leaving_ND

    @torch.no_grad()
    def run(self, index: int) -> None:
        """Run one batch through the layer and keep its states."""
        model = self._whole.streamed.model
        hidden_BTD = self.entering(index)
        inputs = layer_inputs(model, hidden_BTD, self._whole.batches[index])
        leaving_BTD = run_layer(model, self.layer, hidden_BTD, inputs)
        self._leaving_ND[self._whole.tokens(index)] = leaving_BTD.flatten(0, 1).cpu()

    def entering(self, index: int) -> Tensor:
        """Return the states of a batch that enter the layer, (B, T, D)."""
        return self._whole.on_device(self._entering_ND, index)


def forward_bytes(streamed: StreamedModel, batches: Sequence[Batch]) -> int:
    """Return the bytes of the activations of the forward pass of the largest batch through a layer."""
    sizes = [(batch["input_ids"].numel(), batch["input_ids"].shape[-1]) for batch in batches]
    return max((layer_bytes(streamed.checkpoint, *size, streamed.model.dtype) for size in sizes), default=0)
