"""Blockwise local distillation (BLD): every candidate of every layer learns its layer of the parent, all at once.

The loss is that of `lit_puzzle.distill.block_losses`: the squared error of the block's output, divided by the square of
the parent's, on the parent's own input to that layer. Blocks are independent of each other: a step of all of them is
one forward pass of the parent and, one after the other, a forward and backward pass of each block. Each is trained as
if it were alone (gradients are clipped by the norm of one block; the optimizer must treat each parameter by itself, as
Adam does).

Reads the parent's folder and its library, whose trained tensors are trained further. Writes into the run folder:
`library/`, which `score`, `search` and `assemble` (`library:`) take in place of the first one; and
`broken_batch_<rank>.pt` when a loss is not finite, which stops the run.
Per process, P parameters of the parent of b bytes, L layers, V vocabulary, D channels, S numbers that train (of all
blocks), N processes, B rows of T tokens:
  Memory: P b / N + P b / L gathered (sharded only) + V D b (embedding) + 16 S / N (float32, gradient, Adam)
    + activations of one block: 3 B T D b for the parent's states + its graph, whatever the number of blocks.
  Disk: S b in the library, 12 S per checkpoint. Traffic of a batch: gathers P b, gradients and weights 4 S each.
With `training.layers` a run trains some layers only, and S counts these; the next run starts from the library it wrote.
With `memory_gib` the parent is read one layer at a time (`lit_puzzle.distill.blocks_streamed`), to the same bits.
Results: `lit_puzzle.distill.block_results`.
Source: arXiv 2411.19146 (blockwise local distillation).

Shapes: C blocks.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

from lit_puzzle.data.batch_validation import check_packed
from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.data.hidden_states import release
from lit_puzzle.distill.block_losses import BlockError, TrainableBlock, block_errors, counted_tokens
from lit_puzzle.distill.block_results import check_losses, loss_results, named
from lit_puzzle.distill.block_selection import check_blocks, select_blocks, write_library
from lit_puzzle.distill.blocks_streamed import BlockTensors, LayerOnDisk, StreamedBlocks, TrainedLayer
from lit_puzzle.distill.settings import BlockTrainingSettings
from lit_puzzle.library.library import LIBRARY_FILE, Library
from lit_puzzle.library.trained_blocks import trained_before, trained_tensors
from lit_puzzle.model.blocks import PuzzleModel, with_own_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import LayerNames
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.modules import model_family
from lit_puzzle.model.surgery import prune_layer
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import record_output
from lit_puzzle.training.finite import check_weights
from lit_puzzle.training.sharding import full, load_for
from lit_puzzle.training.trainer_validation import check_trainer


class BlockwiseDistillation(LightningModule):
    """Distills a parent, layer by layer, into the blocks of its library.

    Args:
        parent: folder of the parent.
        library: folder of its library.
        training: which blocks and tensors train, in which dtype and by which implementations.
        completions_only: counts the error of those tokens only that stand before generated ones, as scoring does.
        clip_norm: largest norm of a block's gradient; None: no clipping.
        optimizer: builds the one optimizer over the parameters of all blocks.
        lr_scheduler: builds the schedule, stepped once per update.
        memory_gib: GiB that the run may take (on a CPU anonymous memory, on a GPU its own): the parent is then read one
            layer at a time, and the blocks of a layer are trained to their end before the next layer is read, in a fit
            of their own. None: the parent is in memory, or sharded over the processes, and all blocks train at once.

    Raises:
        ValueError: impossible settings, or a library of another parent.
    """

    def __init__(
        self,
        parent: Path,
        library: Path,
        training: BlockTrainingSettings = BlockTrainingSettings(),  # noqa: B008  (frozen)
        completions_only: bool = False,
        clip_norm: float | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        memory_gib: float | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise ValueError(f"clip_norm={clip_norm} was given; it is above 0 and finite, or null for no clipping.")
        self.parent_folder = require_input(parent, "parent checkpoint", "config.json")
        self.library_folder = require_input(library, "block library", LIBRARY_FILE)
        self.library = Library.load(self.library_folder)
        self.checkpoint = Checkpoint(self.parent_folder)
        self.library.check_parent(self.checkpoint.fingerprint())
        self.training_settings = training
        before = trained_before(self.library_folder, self.library)
        self.selected = select_blocks(self.library_folder, self.library, training, before)
        check_blocks(self.library_folder, self.checkpoint, self.library, self.selected)
        self.completions_only, self.clip_norm = completions_only, clip_norm
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.memory_gib = memory_gib
        self.strict_loading = False  # checkpoints contain what trains only
        self.results: dict[str, float] = {}
        self.parent: PuzzleModel | None = None
        self.on_disk: LayerOnDisk | None = None  # in a fit of one layer, in place of the parent
        self.blocks = nn.ModuleList()
        self._losses: list[Tensor] = []  # (C) per batch
        self._val_losses: list[Tensor] = []  # (C) per validation

    # ---- building -------------------------------------------------------------------------------------------------

    def input_identities(self) -> dict[str, Identity]:
        """Return the identities of the parent and of its library."""
        return {
            "parent": checkpoint_identity(self.checkpoint),
            "library": self.library.identity(self.library_folder),
        }

    def setup(self, stage: str) -> None:
        """Check the Trainer's settings, and that the documents are of the parent's vocabulary, before anything slow."""
        self._check(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]

    def _check(self, trainer: Trainer, data: object) -> None:
        check_trainer(trainer, self.training_settings.dtype)
        if isinstance(data, PackedDocuments):
            data.folder.check_parent(self.parent_folder, data.sequence_tokens)

    def configure_model(self) -> None:
        """Load the parent, make the blocks of each layer from it, and shard each layer and block by itself."""
        if len(self.blocks):
            return
        if self.on_disk is not None:
            self.blocks.extend(self._make_blocks(self.on_disk.layer, self.on_disk.decoder, self.on_disk.names))
            return
        mesh, settings = self.device_mesh, self.training_settings
        loaded, waiting = load_for(mesh, self.parent_folder, settings.dtype, settings.attention, settings.experts)
        self.parent = with_own_blocks(loaded.requires_grad_(False)).eval()
        self.parent.lm_head = nn.Identity()  # logits are not needed
        del self.parent.model.layers[self.selected[-1].layer + 1 :]
        names = model_family(self.parent).layer
        for layer, decoder in enumerate(self.parent.model.layers):
            if waiting is not None:
                waiting.fill(decoder)
            decoder.requires_grad_(False)
            made = self._make_blocks(layer, decoder, names)
            self.blocks.extend(made)
            if mesh is not None and mesh.size() > 1:
                for module in (decoder, *made):  # no root: layers are called one by one, never as one model
                    fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=False)

    def _make_blocks(self, layer: int, decoder: nn.Module, names: LayerNames) -> list[TrainableBlock]:
        made = []
        for block in self.selected:
            if block.layer == layer:
                own = {name: decoder.get_parameter(name).detach() for name in block.tensors}
                kept = prune_layer(own, block.block.experts, names)
                candidate = self.library.candidate(layer, block.name)
                before = trained_tensors(self.library_folder, self.library.config, candidate)
                made.append(TrainableBlock(block, kept | before, names))
        return made

    def configure_optimizers(self) -> Any:
        """Build one optimizer over all blocks, and the schedule."""
        optimizer = self.optimizer(list(self.blocks.parameters()))
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    # ---- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: PackedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Update every block and return the mean of their losses."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        losses = []
        for block, error, norm in self._errors(batch):
            loss = error / norm
            # FSDP averages the gradients over processes; the loss needs their sum.
            self.manual_backward(loss * self.trainer.world_size)
            if self.clip_norm is not None:
                clip_grad_norm_(list(block.parameters()), self.clip_norm)
            losses.append(loss.detach())
        losses_C = self._sum(torch.stack(losses)).cpu()
        folder = Path(self.trainer.default_root_dir)
        check_losses(self.selected, losses_C, batch, self.global_step, folder, self.global_rank)
        optimizer.step()
        check_weights(self.trainer, self, self.trainer.global_step)  # counted by the step
        schedule: Any = self.lr_schedulers()
        if schedule is not None:
            schedule.step()
        self._losses.append(losses_C)
        self.log_dict(named("train", self.selected, losses_C), batch_size=1)
        self.log("train/loss", losses_C.mean(), prog_bar=True, batch_size=1)
        return {"loss": losses_C.mean()}

    def _errors(self, batch: PackedBatch) -> Iterator[BlockError]:
        parent = self.parent if self.on_disk is None else self.on_disk.parent
        assert parent is not None
        check_packed(batch, parent.config.max_position_embeddings, parent.config.vocab_size)
        blocks: list[Any] = list(self.blocks)
        counted_BT = counted_tokens(batch, self.completions_only)
        if self.on_disk is not None:
            return self.on_disk.errors(blocks, batch, counted_BT, self._sum)
        return block_errors(parent, blocks, batch, counted_BT, self._sum)

    def _sum(self, tensor: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    # ---- evaluating -----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums of errors and norms over all batches."""
        self._validated_2C = torch.zeros(2, len(self.blocks), dtype=torch.float64, device=self.device)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add a batch to the sums."""
        with torch.inference_mode(False), torch.no_grad():  # sharded weights cannot be gathered in inference mode
            for index, (block, error, norm) in enumerate(self._errors(batch)):
                self._validated_2C[:, index] += torch.stack([error.double(), norm / self.trainer.world_size])
                release(block)

    def on_validation_epoch_end(self) -> None:
        """Log the loss of every block, and their mean."""
        errors_C, norms_C = self._sum(self._validated_2C).cpu()
        losses_C = errors_C / norms_C
        self.log_dict(named("val", self.selected, losses_C), sync_dist=True)
        self.log("val/loss", float(losses_C.mean()), prog_bar=True, sync_dist=True)
        if not self.trainer.sanity_checking:
            self._val_losses.append(losses_C)

    def on_fit_end(self) -> None:
        """Write the library and fill `results`, or keep what was trained of one layer."""
        if self.on_disk is not None:
            tensors = dict(self._trained())
            self.on_disk.keep(TrainedLayer(tensors, torch.stack(self._losses), self._val_losses))
            return
        self._finish(self.trainer, self._trained(), torch.stack(self._losses), self._val_losses)

    def _finish(
        self, trainer: Trainer, trained: Iterable[BlockTensors], losses_NC: Tensor, validated: Sequence[Tensor]
    ) -> None:
        target, writes = Path(trainer.default_root_dir) / "library", trainer.is_global_zero
        write_library(target, self.library_folder, self.library, self.checkpoint, trained, writes)
        if writes:
            record_output(target.parent, "library", Library.load(target).identity(target))
        self.results = loss_results(self.selected, losses_NC, validated)

    def _trained(self) -> Iterator[BlockTensors]:
        blocks: Any = self.blocks
        for block in blocks:
            yield block.selected, {name: full(tensor).detach() for name, tensor in block.tensors().items()}

    # ---- one layer at a time --------------------------------------------------------------------------------------

    def fit_layers(self, trainer: Trainer, data: LightningDataModule, new_trainer: Callable[[Path], Trainer]) -> None:
        """Train the blocks of one layer after the other, each in a fit of its own: see `memory_gib`.

        Args:
            trainer: the run's Trainer, which does not fit itself.
            data: the run's data.
            new_trainer: returns another Trainer of the same settings for a folder.

        Raises:
            ValueError: impossible settings, a budget that is too small, or several processes.
        """
        assert self.memory_gib is not None
        self._check(trainer, data)
        stream = StreamedBlocks(self.checkpoint, self.selected, self.training_settings, self.memory_gib, trainer, data)
        for at in stream.untrained():
            stream.fit(at, self._of_layer(at), new_trainer(at.folder))
        self._finish(trainer, stream.trained(), *stream.losses())
        stream.close()

    def _of_layer(self, at: LayerOnDisk) -> "BlockwiseDistillation":
        settings = dataclasses.replace(self.training_settings, layers=[at.layer])
        ours = settings, self.completions_only, self.clip_norm, self.optimizer, self.lr_scheduler
        one = BlockwiseDistillation(self.parent_folder, self.library_folder, *ours)
        one.on_disk = at
        return one

    # ---- resuming -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the parent; add the losses so far."""
        state: dict[str, Tensor] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name.startswith("blocks.")}
        checkpoint["losses"] = [torch.stack(self._losses), list(self._val_losses)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the losses of the checkpoint."""
        losses, self._val_losses = checkpoint["losses"]
        self._losses = list(losses)
