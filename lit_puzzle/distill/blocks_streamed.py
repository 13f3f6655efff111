"""Blockwise distillation of a parent that is read one layer at a time, bit for bit that of a parent in memory.

Blocks of different layers do not influence each other, so that a layer's blocks can be trained to their end before the
next layer is read. For each layer: all batches run through it once; then a fit of its own (same updates, batches and
order, validations and schedule) trains its blocks on the states that enter and leave the layer, and what it has
trained is kept. The parent's experts run once for every different batch, not at every update.

Writes, in the folder of the pass, the states between layers (`lit_puzzle.model.state_files`), `fit.LAYER` with the
checkpoints of the layer in training, and `trained.LAYER` (`lit_puzzle.distill.kept_layers`), which says that a layer is
done. A run that was killed continues from the last checkpoint of the layer at which it stopped, for as many updates as
the layers before it.

Memory: that of `lit_puzzle.model.memory_budget`, with `lit_puzzle.distill.blocks_footprint.layer_training_bytes` as
activations, and 16 bytes a token of different batches. Disk: 2 T D b of states for T tokens of different batches, D
channels of b bytes; 4 S of trained numbers, 12 S of one layer per checkpoint. Traffic: the parent once; at each layer
2 T D b of states, and 2 D b for each token of every update.

Shapes: B rows, T tokens of a row, D channels, C blocks, N updates, V validations.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from safetensors import safe_open
from torch import Tensor

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.distill.block_batches import all_batches, check_one_process, each_once, key_of, updates_of
from lit_puzzle.distill.block_losses import (
    BlockError,
    LayerInputs,
    States,
    TrainableBlock,
    layer_errors,
    layer_inputs,
    parent_middle,
    parent_states,
)
from lit_puzzle.distill.block_selection import SelectedBlock, layer_numbers
from lit_puzzle.distill.blocks_footprint import BUFFERS, layer_training_bytes
from lit_puzzle.distill.kept_layers import LOSSES, VALIDATED, check_updates, kept_updates, write_kept
from lit_puzzle.distill.settings import BlockTrainingSettings
from lit_puzzle.model.blocks import PuzzleModel
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import LayerNames
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.layer_pass import PARENT, LayerPass
from lit_puzzle.model.modules import model_family
from lit_puzzle.model.streaming import load_streamed
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.precision import layer_precision

FOLDER = "layers.0"  # of the run folder

BlockTensors = tuple[SelectedBlock, dict[str, Tensor]]  # a block, and its trained tensors by name inside the layer


class TrainedLayer(NamedTuple):
    """What a fit of one layer has made: tensors by block, (N, C) losses of updates, (C) losses of each validation."""

    tensors: Mapping[SelectedBlock, Mapping[str, Tensor]]
    losses_NC: Tensor
    validated: Sequence[Tensor]


class LayerOnDisk:
    """One layer of the parent with its weights, and the states of all batches that enter and leave it.

    Attributes:
        layer: its index.
        decoder: the layer.
        folder: of the fit that trains its blocks.
        keep: is called with what was trained.
    """

    def __init__(
        self,
        layers: LayerPass,
        index_of: Mapping[str, int],
        layer: int,
        decoder: Any,
        folder: Path,
        keep: Callable[[TrainedLayer], None],
    ) -> None:
        self.layer, self.decoder, self.folder, self.keep = layer, decoder, folder, keep
        self._layers, self._index_of = layers, index_of
        self._entering_ND, self._leaving_ND = (layers.states.read(PARENT, at) for at in (layer, layer + 1))

    @property
    def parent(self) -> PuzzleModel:
        """The parent, of which this layer alone has weights."""
        return self._layers.source.model

    @property
    def names(self) -> LayerNames:
        """Names of the parts of a layer of the parent's family."""
        return model_family(self.parent).layer

    def errors(
        self,
        blocks: Sequence[TrainableBlock],
        batch: PackedBatch,
        counted_BT: Tensor,
        sum_over_processes: Callable[[Tensor], Tensor],
    ) -> Iterator[BlockError]:
        """Yield the errors of blocks of this layer; arguments as for `lit_puzzle.distill.block_losses.block_errors`.

        Raises:
            ValueError: a batch that the data did not give when the run started.
        """
        index = self._index_of.get(key_of(batch))
        if index is None:
            raise ValueError(
                "memory_gib: the data gave a batch that it did not give when the run started, so that the parent's "
                "states of it are not there. Give data that is the same each time, or set memory_gib: null."
            )
        with torch.no_grad():
            inputs = layer_inputs(self.parent, batch, counted_BT, [block.selected for block in blocks])
            enters_BTD, leaves_BTD = (
                self._layers.on_device(states_ND, index) for states_ND in (self._entering_ND, self._leaving_ND)
            )
            states = States(enters_BTD, parent_middle(self.parent, self.layer, enters_BTD, inputs), leaves_BTD)
        yield from layer_errors(self.parent, blocks, states, inputs, sum_over_processes)


class StreamedBlocks:
    """A run of blockwise distillation, layer by layer.

    Args:
        checkpoint: the parent.
        selected: the blocks that train.
        settings: how the parent is loaded.
        memory_gib: the budget.
        trainer: the run's Trainer, which does not fit itself.
        data: the run's data.

    Raises:
        ValueError: several processes, `max_steps` unset or other than that of layers that are done, or a
            budget that is too small.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        selected: Sequence[SelectedBlock],
        settings: BlockTrainingSettings,
        memory_gib: float,
        trainer: Trainer,
        data: LightningDataModule,
    ) -> None:
        check_one_process(trainer, memory_gib)
        self.selected, self.data = selected, data
        self.folder = Path(trainer.default_root_dir) / FOLDER
        device = trainer.strategy.root_device
        self.context = trainer.precision_plugin.forward_context  # of the parent in a fit
        how = settings.dtype, memory_gib, settings.attention, device
        streamed = load_streamed(checkpoint.folder, *how, experts=settings.experts)
        data.trainer = trainer
        data.prepare_data()
        data.setup("fit")
        self.updates = updates_of(trainer, len(data.train_dataloader()))
        for layer in dict.fromkeys(block.layer for block in selected):
            check_updates(self._file(layer), layer, self.updates)
        batches, self.index_of = each_once(all_batches(data, self.updates))
        longest = max((batch["input_ids"].shape for batch in batches), key=math.prod)
        precision = layer_precision(trainer.precision, settings.dtype)
        size = model_size(checkpoint.config)
        numbers = max(layer_numbers(checkpoint.config, selected).values())
        training = BUFFERS * sum(layer_training_bytes(size, math.prod(longest), precision, numbers).values())
        computing = max(int(training) - streamed.forward_bytes(math.prod(longest), longest[-1]), 0)
        self.layers = LayerPass(streamed, self.folder, batches, computing)

    def untrained(self) -> Iterator[LayerOnDisk]:
        """Yield each layer whose blocks are not trained yet; its `keep` must be called before the next one."""
        states, last = self.layers.states, self.selected[-1].layer
        if all(self._is_done(block.layer) for block in self.selected):
            return
        for layer, decoder in self.layers.source.layers(self._next_layer(), last + 1, self.layers.ahead):
            if not states.has(PARENT, layer + 1):
                self._pass_through(layer)
            if any(block.layer == layer for block in self.selected) and not self._is_done(layer):
                folder = self.folder / f"fit.{layer}"
                folder.mkdir(exist_ok=True)
                yield LayerOnDisk(self.layers, self.index_of, layer, decoder, folder, self._keeper(layer))
                assert self._is_done(layer)
                rmtree(folder)
                gc.collect()  # module and Trainer refer to each other: they would stay beside the next layer's
            states.remove(PARENT, but=[layer + 1])

    def _next_layer(self) -> int:
        """Return the layer at which the run continues, whose entering states are there."""
        states = self.layers.states
        for layer in states.layers(PARENT):
            if all(self._is_done(block.layer) for block in self.selected if block.layer < layer):
                return layer
        self.layers.restart()
        return 0

    def _pass_through(self, layer: int) -> None:
        """Run all batches through a layer, in the arithmetic of a fit."""
        states = self.layers.states
        entering_ND = states.read(PARENT, layer)
        with states.write(PARENT, layer + 1) as leaving_ND:
            for index, batch in enumerate(self.layers.batches):
                enters_BTD = self.layers.on_device(entering_ND, index)
                with torch.no_grad(), self.context():
                    leaves_BTD = parent_states(self._model, layer, enters_BTD, self._inputs(batch)).leaves
                assert leaves_BTD.dtype == leaving_ND.dtype
                leaving_ND[self.layers.tokens(index)] = leaves_BTD.flatten(0, 1).cpu()

    @property
    def _model(self) -> PuzzleModel:
        return self.layers.source.model

    def _inputs(self, batch: PackedBatch) -> LayerInputs:
        moved = {name: tensor.to(self.layers.source.device) for name, tensor in batch.items()}
        return layer_inputs(self._model, moved, torch.ones_like(moved["input_ids"], dtype=torch.bool), [])

    def fit(self, at: LayerOnDisk, module: LightningModule, trainer: Trainer) -> None:
        """Train the blocks of one layer, from its last checkpoint if there is one."""
        print(f"blocks of layer {at.layer}; the last is {self.selected[-1].layer}", flush=True)
        train, val = self.data.train_dataloader(), self.data.val_dataloader()
        trainer.fit(module, train_dataloaders=train, val_dataloaders=val, ckpt_path=sound_checkpoint(at.folder))

    def trained(self) -> Iterator[BlockTensors]:
        """Yield every block with its trained tensors."""
        for block in self.selected:
            with safe_open(self._file(block.layer), "pt") as file:
                yield block, {name: file.get_tensor(f"{block.name}/{name}") for name in block.tensors}

    def losses(self) -> tuple[Tensor, list[Tensor]]:
        """Return (N, C) losses of all blocks at every update, and (C) losses of each validation."""
        of_layers, validated = [], []
        for layer in dict.fromkeys(block.layer for block in self.selected):
            with safe_open(self._file(layer), "pt") as file:
                of_layers.append(file.get_tensor(LOSSES))
                validated.append(file.get_tensor(VALIDATED))
        return torch.cat(of_layers, dim=1), list(torch.cat(validated, dim=1))

    def close(self) -> None:
        """Remove the states; what was trained stays as checkpoints do, until the run folder is removed."""
        self.layers.states.remove(PARENT)
        for left in self.folder.glob("fit.*"):  # of a run that was killed when its layer was done
            rmtree(left)

    def _file(self, layer: int) -> Path:
        return self.folder / f"trained.{layer}"

    def _is_done(self, layer: int) -> bool:
        """Return whether the blocks of a layer have had all their updates."""
        return kept_updates(self._file(layer)) == self.updates

    def _keeper(self, layer: int) -> Callable[[TrainedLayer], None]:
        def keep(trained: TrainedLayer) -> None:
            if len(trained.losses_NC) != self.updates:
                raise ValueError(
                    f"memory_gib: layer {layer} stopped after {len(trained.losses_NC)} of {self.updates} updates. All "
                    "layers train for the same number: set trainer.max_steps, and no max_time or early stopping."
                )
            tensors = {f"{block.name}/{name}": t for block, own in trained.tensors.items() for name, t in own.items()}
            validated_VC = torch.stack(list(trained.validated)) if trained.validated else trained.losses_NC[:0].double()
            tensors |= {LOSSES: trained.losses_NC, VALIDATED: validated_VC}
            write_kept(self._file(layer), tensors)

        return keep
