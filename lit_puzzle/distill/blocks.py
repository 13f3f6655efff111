"""Blockwise local distillation (BLD): every candidate of every layer learns its layer of the parent, all at once.

The loss is that of `lit_puzzle.distill.block_losses`: the squared error of the block's output, divided by the square of
the parent's, on the parent's true input to that layer. Blocks know nothing of each other: a step of all of them is one
parent forward and, one after the other, a forward and backward of each block; each is trained as if it were alone
(gradients are clipped by the norm of one block; the optimizer must treat each parameter by itself, as Adam does).

Reads: the parent's folder and its library; tensors that a candidate has already go on training. Writes into the run
folder: `library/`, which `score`, `search` and `assemble` (`library:`) take in place of the first one; a loss that
is no number stops the run and leaves `broken_batch_<rank>.pt`.
Per process, P parameters of the parent of b bytes, L layers, V vocabulary, D channels, S numbers that train (of all
blocks), N processes, B rows of T tokens:
  Memory: P b / N + P b / L gathered (sharded only) + V D b (embedding) + 16 S / N (float32, gradient, Adam)
    + activations of one block: 3 B T D b for the parent's states + its graph, whatever the number of blocks.
  Disk: S b in the library, 12 S per checkpoint. Traffic of a batch: gathers P b, gradients and weights 4 S each.
`layers` trains some layers in one run and the others, with the library it wrote, in the next: S is theirs alone.
Results: `loss/mean/first|last` and, per block, `loss/<layer>/<name>/first|last`: over the first and last tenth of the
batches; `val_loss/mean/first|last`.
Source: arXiv 2411.19146 (blockwise local distillation).

Shapes: C blocks.
"""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

from lit_puzzle.data.batch_validation import check_packed
from lit_puzzle.data.hidden_states import release
from lit_puzzle.distill.block_losses import Batch, BlockError, TrainedBlock, block_errors, counted_tokens
from lit_puzzle.distill.blocks_to_train import BlockToTrain, SubBlocks, check_blocks, choose_blocks, write_library
from lit_puzzle.library.library import Library
from lit_puzzle.library.trained_blocks import trained_tensors
from lit_puzzle.model.blocks import with_own_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.gpt_oss import GptOssPuzzleForCausalLM
from lit_puzzle.model.layout import EXPERT_ROWS
from lit_puzzle.model.loading import DtypeName, WaitingExperts
from lit_puzzle.model.surgery import select_rows
from lit_puzzle.run.folder import require_input
from lit_puzzle.training.sharding import full, load_for
from lit_puzzle.training.trainer_validation import check_trainer


class BlockwiseDistillation(LightningModule):
    """Distills a parent, layer by layer, into the blocks of its library.

    Args:
        parent: Folder of the parent.
        library: Folder of its library.
        layers: Only candidates of these layers; by default of all.
        sub_blocks: `apart` trains expert halves and attention halves, whose damages the search adds; `together` trains
            every candidate as a whole (score it with pairs).
        train: Patterns of the tensors that train, by their names inside a layer; by default what the surgery touched.
            completions_only: Counts the error of those tokens only from which the parent wrote the next one, as scoring
            does. clip_norm: Largest norm of a block's gradient; by default it is as it comes. optimizer: Builds the one
            optimizer over the parameters of all blocks. lr_scheduler: Builds the schedule, stepped once per update.
            dtype: Dtype of the parent; what trains is kept in float32 and rounded to it when used. attention:
            Implementation of attention. experts: Implementation of the experts.

    Raises:
        ValueError: Settings that are not possible, or a library of another parent.
    """

    def __init__(
        self,
        parent: Path,
        library: Path,
        layers: list[int] | None = None,
        sub_blocks: SubBlocks = "apart",
        train: list[str] | None = None,
        completions_only: bool = False,
        clip_norm: float | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str = "sink_attention",
        experts: str = "grouped_mm",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"clip_norm={clip_norm} was given; it is above 0, or null for no clipping.")
        self.parent_folder = require_input(parent, "parent checkpoint")
        self.library_folder = require_input(library, "block library")
        self.library = Library.load(self.library_folder)
        self.checkpoint = Checkpoint(self.parent_folder)
        self.library.check_parent(self.checkpoint.fingerprint())
        self.chosen = self._choose(layers, sub_blocks, train)
        self.completions_only, self.clip_norm = completions_only, clip_norm
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.dtype_name: DtypeName = dtype
        self.attention, self.experts = attention, experts
        self.strict_loading = False  # checkpoints hold what trains only
        self.results: dict[str, float] = {}
        self.parent: GptOssPuzzleForCausalLM | None = None
        self.blocks = nn.ModuleList()
        self._losses: list[Tensor] = []  # (C) per batch
        self._val_losses: list[float] = []

    def _choose(self, layers: list[int] | None, sub_blocks: SubBlocks, train: list[str] | None) -> list[BlockToTrain]:
        before = {
            (layer, candidate.name): trained_tensors(self.library_folder, self.library.config, candidate).keys()
            for layer, candidates in enumerate(self.library.layers)
            for candidate in candidates
            if candidate.weights is not None
        }
        chosen = choose_blocks(self.library_folder, self.library, layers, sub_blocks, train, before)
        check_blocks(self.library_folder, self.checkpoint, self.library, chosen)
        return chosen

    # ---- building -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Checks what depends on the trainer before anything slow."""
        check_trainer(self.trainer, self.dtype_name)

    def configure_model(self) -> None:
        """Loads the parent, makes each layer's blocks of it, and shards both, each layer and block by itself."""
        if self.parent is not None:
            return
        mesh = self.device_mesh
        loaded, waiting = load_for(mesh, self.parent_folder, self.dtype_name, self.attention, self.experts)
        self.parent = with_own_blocks(loaded.requires_grad_(False)).eval()
        self.parent.lm_head = nn.Identity()  # nobody asks for logits
        del self.parent.model.layers[self.chosen[-1].layer + 1 :]
        for layer, decoder in enumerate(self.parent.model.layers):
            made = self._make_blocks(layer, decoder, waiting)
            self.blocks.extend(made)
            if mesh is not None and mesh.size() > 1:
                for module in (decoder, *made):  # no root: layers are called one by one, never as one model
                    fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=False)

    def _make_blocks(self, layer: int, decoder: nn.Module, waiting: WaitingExperts | None) -> list[TrainedBlock]:
        if waiting is not None:
            waiting.fill(decoder)
        decoder.requires_grad_(False)
        made = []
        for block in self.chosen:
            if block.layer == layer:
                own = {name: decoder.get_parameter(name).detach() for name in block.tensors}
                rows = block.block.experts
                cut = {name: select_rows(own[name], rows) if name in EXPERT_ROWS else own[name] for name in own}
                candidate = self.library.candidate(layer, block.name)
                before = trained_tensors(self.library_folder, self.library.config, candidate)
                made.append(TrainedBlock(block, cut | before))
        return made

    def configure_optimizers(self) -> Any:
        """One optimizer over all blocks; the schedule counts updates."""
        optimizer = self.optimizer(list(self.blocks.parameters()))
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    # ---- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One update of every block; returns the mean of their losses."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        found = []
        for block, error, norm in self._errors(batch):
            loss = error / norm
            # Gradients of sharded blocks are averaged over processes, where they have to be summed.
            self.manual_backward(loss * self.trainer.world_size)
            if self.clip_norm is not None:
                clip_grad_norm_(list(block.parameters()), self.clip_norm)
            found.append(loss.detach())
        losses_C = self._sum(torch.stack(found)).cpu()
        self._check_finite(losses_C, batch)
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        if schedule is not None:
            schedule.step()
        self._losses.append(losses_C)
        self.log_dict(self._named("train", losses_C), batch_size=1)
        self.log("train/loss", losses_C.mean(), prog_bar=True, batch_size=1)
        return {"loss": losses_C.mean()}

    def _errors(self, batch: Batch) -> Iterator[BlockError]:
        assert self.parent is not None
        check_packed(batch, self.parent.config.max_position_embeddings, self.parent.config.vocab_size)
        blocks: list[Any] = list(self.blocks)
        return block_errors(self.parent, blocks, batch, counted_tokens(batch, self.completions_only), self._sum)

    def _sum(self, tensor: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _named(self, split: str, losses_C: Tensor) -> dict[str, float]:
        pairs = zip(self.chosen, losses_C.tolist(), strict=True)
        return {f"{split}/{block.title}": loss for block, loss in pairs}

    def _check_finite(self, losses_C: Tensor, batch: Batch) -> None:
        """The losses are those of all processes: either all stop or none."""
        broken = [block for block, loss in zip(self.chosen, losses_C.tolist(), strict=True) if not isfinite(loss)]
        if not broken:
            return
        file = Path(self.trainer.default_root_dir) / f"broken_batch_{self.global_rank}.pt"
        content = {"batch": {name: tensor.cpu() for name, tensor in batch.items()}, "step": self.global_step}
        torch.save(content | {"losses": losses_C}, file)
        names = [f"{block.name!r} of layer {block.layer}" for block in broken]
        raise ValueError(
            f"The loss of {', '.join(names[:4])}{' and others' if len(names) > 4 else ''} is no number at step "
            f"{self.global_step}; the batch is in {file}. Lower the learning rate, set clip_norm, or look for broken "
            "weights in the parent or the library."
        )

    # ---- measuring ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Errors and norms are added up over all batches."""
        self._validated_2C = torch.zeros(2, len(self.blocks), dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds up a batch."""
        with torch.inference_mode(False), torch.no_grad():  # sharded weights cannot be gathered in inference mode
            for index, (block, error, norm) in enumerate(self._errors(batch)):
                self._validated_2C[:, index] += torch.stack([error.double(), norm / self.trainer.world_size])
                release(block)

    def on_validation_epoch_end(self) -> None:
        """Logs the loss of every block, and their mean."""
        errors_C, norms_C = self._sum(self._validated_2C).cpu()
        losses_C = errors_C / norms_C
        self.log_dict(self._named("val", losses_C), sync_dist=True)
        self.log("val/loss", float(losses_C.mean()), prog_bar=True, sync_dist=True)
        if not self.trainer.sanity_checking:
            self._val_losses.append(float(losses_C.mean()))

    def on_fit_end(self) -> None:
        """Writes the library and fills `results`."""
        target, writes = Path(self.trainer.default_root_dir) / "library", self.trainer.is_global_zero
        write_library(target, self.library_folder, self.library, self.checkpoint, self._trained(), writes)
        losses, tenth = torch.stack(self._losses), max(1, len(self._losses) // 10)
        for when, part_C in (("first", losses[:tenth].mean(0)), ("last", losses[-tenth:].mean(0))):
            self.results[f"loss/mean/{when}"] = float(part_C.mean())
            self.results |= {f"{name}/{when}": value for name, value in self._named("loss", part_C).items()}
        if self._val_losses:
            self.results |= {"val_loss/mean/first": self._val_losses[0], "val_loss/mean/last": self._val_losses[-1]}

    def _trained(self) -> Iterator[tuple[BlockToTrain, dict[str, Tensor]]]:
        blocks: Any = self.blocks
        for block in blocks:
            yield block.what, {name: full(tensor).detach() for name, tensor in block.tensors().items()}

    # ---- resuming -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops the parent; adds the losses so far."""
        state: dict[str, Tensor] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name.startswith("blocks.")}
        checkpoint["losses"] = [torch.stack(self._losses), list(self._val_losses)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues where the checkpoint left."""
        losses, self._val_losses = checkpoint["losses"]
        self._losses = list(losses)
