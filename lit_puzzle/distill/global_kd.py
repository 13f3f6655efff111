"""Global distillation: a whole child learns from its whole parent, on documents that the parent wrote.

The loss is that of `lit_puzzle.distill.losses`, divided by the tokens of the batch. Experts and router stay frozen. The
parent runs in the same process, sharded like the child; or its best tokens on disk take its place. Validation gives the
loss per target (`val/loss`) and, if asked for, the accuracy on held-out problems; accuracy is measured before training,
and after it on what is saved: the best validated weights, averaged if `ema_decay` is given, rounded, adapters merged.

Reads: the child's folder and the parent's (or its `top_logits`). Writes into the run folder: `before/`, `after/`
(episodes, with `accuracy`), `child/`, and `broken_batch_<rank>.pt` when a loss is no number, which stops the run.
Per process, with P and Q parameters of child and parent of b bytes, L layers, T parameters trained, N processes:
  Memory: (P b + Q b + 12 T) / N (gradient, Adam; + 4 T / N averages) + 2 (P + Q) b / L gathered
    + embedding and head while N > 1 (V tokens of D: the child's and their gradients 16 V D, the parent's 2 V D b)
    + activations (`lit_puzzle.distill.objective`) + logits of a chunk (`lit_puzzle.distill.losses`).
  Disk: child P b + 12 T per checkpoint to resume from, 4 T per best (+ 4 T each with averages).
  Traffic of a batch: gathers 2 P b + Q b, gradients 4 T.
Results: `loss/first|last` (in training, means over the first and last tenth of the batches), `val_loss/first|best`, and
with `accuracy` those of a recovery (`lit_puzzle.evaluate.before_after.recovery_results`).
Source: arXiv 2602.11937 (what is frozen, the data), arXiv 2411.19146 (the loss).
"""

from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, distributed
from transformers import AutoTokenizer, PreTrainedModel

from lit_puzzle.child.save import become_saved, save_child
from lit_puzzle.data.batch_validation import check_finite, check_packed, check_same_tokens
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.data.hidden_states import release
from lit_puzzle.distill.held_out import AccuracySettings, HeldOutAccuracy
from lit_puzzle.distill.losses import LossSettings
from lit_puzzle.distill.objective import Batch, Terms, distillation_terms, no_terms
from lit_puzzle.distill.top_logits_files import TopLogits
from lit_puzzle.evaluate.before_after import validation_values
from lit_puzzle.model.loading import DtypeName
from lit_puzzle.run.folder import require_input
from lit_puzzle.spec import Plan
from lit_puzzle.training.best_weights import load_best
from lit_puzzle.training.ema import WeightAverage
from lit_puzzle.training.random_state import RandomState, put_random_state, take_random_state
from lit_puzzle.training.sharding import load_for, shard
from lit_puzzle.training.trainable import FROZEN, LoraSettings, freeze_parameters, optimize_trainable
from lit_puzzle.training.trainer_validation import check_trainer


class GlobalDistillation(LightningModule):
    """Distills a parent into a child.

    Args:
        child: folder of the child: weights, configuration, tokenizer.
        parent: folder of the parent, which runs beside the child.
        top_logits: folder of the parent's best tokens, in its place.
        loss: what is distilled.
        accuracy: what is asked before and after; none: only losses are reported.
        freeze: patterns of parameters that are not trained; by default experts and router.
        lora: trains low-rank adapters instead; everything else is then frozen.
        ema_decay: validates and saves an exponential moving average of the weights, of this decay.
        gradient_checkpointing: recomputes the child's activations in backward.
        optimizer: builds the optimizer on the trainable parameters.
        lr_scheduler: builds the schedule, stepped once per update.
        dtype: dtype in which weights are loaded; those that train are kept in float32.
        attention: attention of both models; decoding is eager.
        experts: implementation of the experts.

    Raises:
        ValueError: settings that cannot work together, or models that are not there or do not fit each other.
    """

    def __init__(
        self,
        child: Path,
        parent: Path | None = None,
        top_logits: Path | None = None,
        loss: LossSettings = LossSettings(),  # noqa: B008  (frozen)
        accuracy: AccuracySettings | None = None,
        freeze: list[str] | None = None,
        lora: LoraSettings | None = None,
        ema_decay: float | None = None,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str = "sink_attention",
        experts: str = "grouped_mm",
    ) -> None:
        super().__init__()
        if (parent is None) == (top_logits is None):
            raise ValueError(f"parent={parent}, top_logits={top_logits} were given; give exactly one of them.")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} was given; it lies between 0 and 1, or is null for no average.")
        self.child_folder = require_input(child, "child")
        self.parent_folder = None if parent is None else require_input(parent, "parent checkpoint")
        if self.parent_folder is not None:
            check_same_tokens(self.parent_folder, self.child_folder)
        else:
            loss.check_without_states()
        self.top_logits_folder, self.loss, self.accuracy = top_logits, loss, accuracy
        self.freeze_patterns = FROZEN if freeze is None else freeze
        self.lora, self.ema_decay, self.gradient_checkpointing = lora, ema_decay, gradient_checkpointing
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.dtype_name: DtypeName = dtype
        self.attention, self.experts = attention, experts
        self.strict_loading = False  # checkpoints hold trainable parameters and averages only
        self.results: dict[str, float] = {}
        self.child: Any = None  # the model, inside a LoRA wrapper if there is one
        self.parent: PreTrainedModel | TopLogits | None = None
        self.average: WeightAverage | None = None
        self.held_out: HeldOutAccuracy | None = None
        self._losses: list[float] = []
        self._val_losses: list[float] = []
        self._resumed_random: RandomState | None = None

    # ---- building -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The child's causal language model inside any LoRA wrapper."""
        return self.child if self.lora is None else self.child.get_base_model()

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.trainer.default_root_dir)

    def setup(self, stage: str) -> None:
        """Checks what depends on trainer and data, and draws the problems that will be asked, before anything slow."""
        check_trainer(self.trainer, self.dtype_name)
        if self.accuracy is not None:
            self.held_out = HeldOutAccuracy(self.accuracy)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.parent_folder is not None and isinstance(data, PackedDocuments):
            data.folder.check_reader(self.parent_folder, data.sequence_tokens)
        if self.top_logits_folder is None:
            return
        if not isinstance(data, PackedDocuments):
            raise ValueError(
                f"top_logits belong to documents: give the data PackedDocuments, not {type(data).__name__}."
            )
        data.folder.check_reader(self.child_folder, data.sequence_tokens)
        self.parent = TopLogits(self.top_logits_folder, data.folder)
        planned = self.child_folder / "plan.json"
        if planned.is_file():
            self.parent.check_parent(Plan.load(planned).parent_fingerprint)

    def configure_model(self) -> None:
        """Loads, freezes, adapts and shards the child, and beside it the parent (in this order only)."""
        if self.child is not None:
            return
        self.tokenizer = AutoTokenizer.from_pretrained(self.child_folder, padding_side="left")
        how, mesh = (self.dtype_name, self.attention, self.experts), self.device_mesh
        self.child, waiting = load_for(mesh, self.child_folder, *how)
        if self.lora is None:
            freeze_parameters(self.child, self.freeze_patterns)
        else:
            self.child = self.lora.wrap(self.child)
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(self.model, self.model.model.layers, mesh, waiting, trains=True)
        if self.ema_decay is not None:
            self.average = WeightAverage(self.child, self.ema_decay)
        if self.parent_folder is not None:
            parent, waiting = load_for(mesh, self.parent_folder, *how)
            self.parent = parent.requires_grad_(False)
            shard(parent, parent.model.layers, mesh, waiting)

    def configure_optimizers(self) -> Any:
        """Optimizer over the trainable parameters; the schedule counts updates."""
        return optimize_trainable(self, self.optimizer, self.lr_scheduler)

    # ---- training -------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Only a child in training mode recomputes its activations."""
        self.child.train()

    def on_train_start(self) -> None:
        """Measures the child once; a resumed run finds the episodes in the run folder."""
        folder = self.run_dir / "before"
        if self.held_out is None or folder.is_dir():
            return
        if self.trainer.global_step > 0:
            raise ValueError(f"{folder} is gone: there is nothing to compare with. Use --overwrite.")
        self.held_out.measure(folder, self.model, self.tokenizer, self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A resumed run goes on with the randomness of its checkpoint (of dropout), whatever loading has drawn."""
        if self._resumed_random is not None:
            put_random_state(self._resumed_random, self.device)
            self._resumed_random = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch, per token of it; what is logged is per target."""
        terms = self._terms(batch)
        check_finite(self.trainer, terms.loss.detach(), batch)
        values = terms.per_target()
        self._losses.append(values["loss"])
        self.log_dict({f"train/{name}": value for name, value in values.items()}, prog_bar=True, batch_size=1)
        return terms.loss / batch["input_ids"].numel()

    def _terms(self, batch: Batch) -> Terms:
        config = self.model.config if isinstance(self.parent, TopLogits) else self.parent.config  # type: ignore[union-attr]
        check_packed(batch, config.max_position_embeddings, config.vocab_size)
        known = self.parent.for_batch(batch) if isinstance(self.parent, TopLogits) else self.parent
        assert known is not None
        return distillation_terms(self.model, known, batch, self.loss)

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """As always; then the average takes in the new weights."""
        super().optimizer_step(*arguments, **keywords)
        if self.average is not None:
            self.average.update(self.trainer.global_step + 1)  # Lightning counts this update afterwards

    # ---- measuring ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """What is validated is the average, if there is one."""
        self._validated = no_terms(self.device)
        if self.average is not None:
            self.average.swap()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds up the terms of a batch."""
        with torch.inference_mode(False), torch.no_grad():  # sharded weights cannot be gathered in inference mode
            self._validated = self._validated.plus(self._terms(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs the loss per target over all processes, and accuracy and tokens if they are asked for."""
        release(self.model)
        total = self._validated.over_processes(self.trainer)
        values = {f"val/{name}": value for name, value in total.per_target().items()}
        if self.held_out is not None and self.held_out.validated:
            pairs = self.held_out.validated
            values |= validation_values(self.held_out.solve(pairs, self.model, self.tokenizer, self.trainer))
        self.log_dict(values, prog_bar=True, sync_dist=True)
        if not self.trainer.sanity_checking:
            self._val_losses.append(values["val/loss"])
        if self.average is not None:
            self.average.swap()

    def on_fit_end(self) -> None:
        """Writes the child from the best weights, measures what was written and fills `results`."""
        load_best(self)
        if self.average is not None:
            self.average.swap()
        is_writer, tenth = self.trainer.is_global_zero, max(1, len(self._losses) // 10)
        save_child(self.child_folder, self.run_dir / "child", self.model, is_writer)
        self.results = {"loss/first": fmean(self._losses[:tenth]), "loss/last": fmean(self._losses[-tenth:])}
        if self._val_losses:
            self.results |= {"val_loss/first": self._val_losses[0], "val_loss/best": min(self._val_losses)}
        if self.held_out is not None:
            become_saved(self.model, self.child_folder)
            self.held_out.measure(self.run_dir / "after", self.model, self.tokenizer, self.trainer)
            self.results |= self.held_out.results(self.run_dir, is_writer)

    # ---- resuming -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops frozen parameters; adds, unless only weights are saved, randomness and the losses so far."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state: dict[str, Tensor] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in trained or k.startswith("average.")}
        if "optimizer_states" in checkpoint:
            checkpoint["random"] = _of_all_processes(take_random_state(self.device))
            checkpoint["losses"] = [list(self._losses), list(self._val_losses)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues where the checkpoint left; with another number of processes, randomness is as the seed has it."""
        self._losses, self._val_losses = (list(values) for values in checkpoint["losses"])
        if len(checkpoint["random"]) == self.trainer.world_size:
            self._resumed_random = checkpoint["random"][self.trainer.global_rank]


def _of_all_processes(own: RandomState) -> list[RandomState]:
    if not distributed.is_initialized():
        return [own]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, own)
    return states
