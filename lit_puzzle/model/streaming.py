"""A model whose decoder layers are read from disk one at a time, for one that does not fit into memory.

`load_streamed` returns a causal language model whose layers are on the meta device; embedding, last norm and head are
there (mapped files where the dtypes agree). `StreamedModel.layers` fills one layer after the other, in place, and
empties each before the next one. While one computes, a thread reads and converts the next, if the budget has room for
two (`lit_puzzle.model.memory_budget`), or else the kernel reads its file ahead.

Reads a checkpoint folder by `lit_puzzle.model.checkpoint`, every layer once each time it is asked for; writes nothing.
Weights are bit for bit those of `lit_puzzle.model.loading.load_model`. How a stage runs a pass over its batches:
`lit_puzzle.model.layer_pass`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_puzzle.model.blocks import PuzzleModel, with_own_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import layer_prefix
from lit_puzzle.model.loading import DtypeName, empty_model, is_tied, loaded, put, stored_bytes, stored_names
from lit_puzzle.model.memory_budget import check_budget, outside_bytes, streaming_need
from lit_puzzle.model.streaming_need import layer_bytes

Values = list[Tensor]  # of the parameters of a layer, in the order of its slots


@dataclass(frozen=True)
class _Slot:
    """One parameter of a layer: its module, its name there, its name in the checkpoint, and its form without values.

    Modules are kept, not names inside the layer, so that wrapping a module (a scoring rule) does not lose it.
    """

    module: nn.Module
    name: str
    full_name: str
    empty: Tensor


class StreamedModel:
    """A model and the reader of its layers.

    Attributes:
        model: the model, frozen, in evaluation mode, with a block of its own for each layer.
        checkpoint: where its layers are read from.
        device: where it computes.
        bytes_read: bytes of layers that were read, as stored.
    """

    def __init__(self, model: PuzzleModel, checkpoint: Checkpoint, device: torch.device, memory_gib: float) -> None:
        self.model, self.checkpoint, self.device, self.memory_gib = model, checkpoint, device, memory_gib
        self.bytes_read = 0
        self._slots = [
            [
                _Slot(module, name, f"{layer_prefix(layer)}{prefix}.{name}", empty)
                for prefix, module in decoder.named_modules()
                for name, empty in module.named_parameters(recurse=False)
            ]
            for layer, decoder in enumerate(model.model.layers)
        ]

    def forward_bytes(self, tokens: int, row_tokens: int) -> int:
        """Return the bytes of the activations of one layer, for a batch and its longest row."""
        return layer_bytes(self.checkpoint.config, tokens, row_tokens, self.model.dtype.itemsize)

    def reads_ahead(self, computing: int) -> bool:
        """Return whether the budget has room for two layers beside `computing` bytes of activations.

        Raises:
            ValueError: it has not even room for one.
        """
        need = streaming_need(self.checkpoint, self.model.dtype, self.device, computing=computing)
        return check_budget(self.memory_gib, need, self.checkpoint.folder)

    def layers(self, first: int, end: int, ahead: bool) -> Iterator[tuple[int, Any]]:
        """Yield each layer's index and the layer, with its weights until the next one is asked for.

        Args:
            first: index of the first layer.
            end: index behind the last layer.
            ahead: whether the next layer is converted while one is in use, see `reads_ahead`.
        """
        with ThreadPoolExecutor(1) as reader:
            coming: Future[Values] | None = None
            for layer in range(first, end):
                values = self._read(layer) if coming is None else coming.result()
                coming = None
                if layer + 1 < end:
                    if ahead:
                        coming = reader.submit(self._read, layer + 1)
                    else:
                        self._announce(layer + 1)
                self._fill(layer, values)
                del values
                try:
                    yield layer, self.model.model.layers[layer]
                finally:
                    self._empty(layer)

    def _read(self, layer: int) -> Values:
        """Return the values of a layer's parameters, in memory of their own on the device."""
        read = []
        for slot in self._slots[layer]:
            read.append(loaded(self.checkpoint, slot.full_name, slot.empty.dtype, self.device))
            self.bytes_read += stored_bytes(self.checkpoint, slot.full_name)
        return read

    def _announce(self, layer: int) -> None:
        """Let the kernel read a layer's bytes into the page cache."""
        for slot in self._slots[layer]:
            for name in stored_names(self.checkpoint, slot.full_name):
                self.checkpoint.read_ahead(name)

    def _fill(self, layer: int, values: Values) -> None:
        for slot, tensor in zip(self._slots[layer], values, strict=True):
            put(slot.module, slot.name, tensor, requires_grad=False)

    def _empty(self, layer: int) -> None:
        for slot in self._slots[layer]:
            put(slot.module, slot.name, slot.empty, requires_grad=False)


class ResidentModel:
    """A model that is in memory, or sharded over processes, with the interface of `StreamedModel`.

    Attributes:
        model: the model, frozen, in evaluation mode, with a block of its own for each layer.
        device: where it computes.
    """

    def __init__(self, model: PuzzleModel, device: torch.device) -> None:
        self.model, self.device = model, device

    def forward_bytes(self, tokens: int, row_tokens: int) -> int:
        """Return 0: no budget is kept."""
        return 0

    def reads_ahead(self, computing: int) -> bool:
        """Return False: there is nothing to read."""
        return False

    def layers(self, first: int, end: int, ahead: bool) -> Iterator[tuple[int, Any]]:
        """Yield each layer's index and the layer."""
        yield from list(enumerate(self.model.model.layers))[first:end]


LayerSource = StreamedModel | ResidentModel


def load_streamed(
    folder: Path,
    dtype: DtypeName,
    memory_gib: float,
    attention: str = "sink_attention",
    device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    head: bool = False,
    experts: str = "grouped_mm",
) -> StreamedModel:
    """Return a model whose layers are read when they are needed.

    Args:
        folder: checkpoint folder of a parent or a child.
        dtype: as for `lit_puzzle.model.loading.load_model`.
        memory_gib: the budget.
        attention: implementation of attention.
        device: where it computes.
        head: whether the head is used; without it, none is loaded.
        experts: implementation of the experts, as for `load_model`.

    Raises:
        ValueError: as for `load_model`, and a budget that is too small for one layer.
    """
    checkpoint, model = empty_model(folder, dtype, attention, experts)
    outside = outside_bytes(checkpoint, model.dtype, device, head)
    check_budget(memory_gib, streaming_need(checkpoint, model.dtype, device, outside), folder)
    checkpoint.check_checksums()
    if not head:
        model.lm_head = nn.Identity()
    for prefix, module in list(model.named_modules()):
        for name, empty in list(module.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}"
            if not full_name.startswith("model.layers.") and not is_tied(checkpoint, full_name):
                put(module, name, checkpoint.read(full_name).to(device, empty.dtype), requires_grad=False)
    if head:
        model.tie_weights()
    model.model.rotary_emb.to(device)
    return StreamedModel(with_own_blocks(model).requires_grad_(False).eval(), checkpoint, device, memory_gib)
