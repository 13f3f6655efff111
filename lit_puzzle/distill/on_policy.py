"""On-policy distillation: the child samples, and the parent's distribution on the child's own tokens is the target.

The child generates a completion of each prompt at its reasoning effort; both models read it, and the divergence of
their distributions at every token of the completion is the loss (`lit_puzzle.distill.on_policy_loss`). So the child is
corrected where it goes by itself, its own mistakes and lengths included, and no answer is graded. The parent runs in
the same process, frozen and sharded like the child. Validation and the evaluation before and after are those of RL
recovery: held-out problems at each effort, `after` on the folder that was written, loaded again.

Reads the child's and the parent's folder. Writes into the run folder: `child/`, `before/` and `after/` (episodes), and
`broken_batch_<rank>.pt` when a loss is not finite, which stops the run.
Per process, with P and Q parameters of child and parent of b bytes, L layers, T parameters trained, N processes, m
completions decoded together of t tokens (prompt included):
  Memory: (P b + Q b + 12 T) / N + rollouts P b if gathered, else 2 P b / L, and the KV cache of m t tokens
    + 2 (P + Q) b / L gathered + activations of a batch + the logits of a chunk (`lit_puzzle.distill.losses`).
  Disk: child P b + 12 T per checkpoint to resume from, 4 T per best + 200 bytes and texts a problem, twice.
  Traffic: of a batch, gathers 2 P b + Q b, gradients 4 T; of a rollout P b if gathered, else P b a token.
Results: `recovery_results` of `lit_puzzle.evaluate.before_after`, and `loss/first|last`.
Source: GKD, arXiv 2306.13649; where it stands among recoveries: arXiv 2602.11937, section on distillation and RL.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.child.save import save_child
from lit_puzzle.child.trained import check_saved
from lit_puzzle.data.batch_validation import check_finite, check_pair
from lit_puzzle.data.hidden_states import release
from lit_puzzle.data.packed_rows import packed_completions
from lit_puzzle.data.prompts import check_lengths, encode
from lit_puzzle.data.rl_prompts import PromptData, prompt_data
from lit_puzzle.data.rollout_prompts import RolloutBatches, RolloutPrompts
from lit_puzzle.distill.child_sampler import ChildSampler
from lit_puzzle.distill.on_policy_loss import on_policy_loss
from lit_puzzle.distill.on_policy_settings import OnPolicySettings
from lit_puzzle.distill.rollout import Rollout, described, means_of, own_state, state_of_all, totals_of
from lit_puzzle.distill.settings import LossSettings, check_no_head_adapter
from lit_puzzle.environments.answer_formats import fix_format
from lit_puzzle.environments.environment import PromptAtEffort
from lit_puzzle.evaluate.before_after import EvaluationSettings, is_measured, print_table, validation_values
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.evaluate.length_score import length_score
from lit_puzzle.evaluate.sampled_evaluation import SampledEvaluation
from lit_puzzle.generation.engine import EngineFailedError
from lit_puzzle.generation.lengths import known_lengths
from lit_puzzle.generation.rollout_checks import check_rollouts
from lit_puzzle.model.chat import fix_date
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.opening import load_config, load_tokenizer
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import run_date
from lit_puzzle.training.best_weights import load_best
from lit_puzzle.training.finite import check_weights
from lit_puzzle.training.load_child import load_child, reload_child
from lit_puzzle.training.random_state import RandomState, set_random_state
from lit_puzzle.training.rollouts import ranks_of
from lit_puzzle.training.settings import TrainingSettings
from lit_puzzle.training.sharding import load_for, shard
from lit_puzzle.training.trainable import drop_frozen, optimize_trainable, release_optimizers, without_adapters
from lit_puzzle.training.trainer_validation import check_trainer


class OnPolicyDistillation(LightningModule):
    """Distills a parent into a child on what the child samples.

    Args:
        child: folder of the child: weights, configuration, tokenizer with a chat template.
        parent: folder of the parent, which runs beside the child.
        on_policy: rollouts of the child, and which weights are the best.
        loss: kind and temperature of the divergence; no hidden states and no language-model loss.
        training: what trains, in which dtype and by which implementations; the parent is loaded and computed alike.
        evaluation: the evaluation before and after.
        optimizer: builds the optimizer on the trainable parameters.
        lr_scheduler: builds the schedule, stepped once per update.

    Raises:
        ValueError: settings that do not fit together, or folders that are missing or do not belong together.
    """

    def __init__(
        self,
        child: Path,
        parent: Path,
        on_policy: OnPolicySettings = OnPolicySettings(),  # noqa: B008  (frozen)
        loss: LossSettings = LossSettings("kl_mix"),  # noqa: B008
        training: TrainingSettings = TrainingSettings(),  # noqa: B008
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        check_no_head_adapter(training)
        self.child_folder = require_input(child, "child", "config.json")
        self.parent_folder = require_input(parent, "parent checkpoint", "config.json")
        check_pair(self.parent_folder, self.child_folder)
        on_policy.check_loss(loss, load_config(self.child_folder).vocab_size)
        self.on_policy, self.loss, self.training_settings, self.evaluation = on_policy, loss, training, evaluation
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.strict_loading = False  # checkpoints contain trainable parameters only
        self.results: dict[str, float] = {}
        self.child: Any = None  # the model, inside a LoRA wrapper if there is one
        self.parent: PreTrainedModel | None = None
        self.batches: RolloutBatches | None = None
        self._rollout: Rollout | None = None
        self._losses = list[float]()
        self._resumed_random: RandomState | None = None
        self._validation_prompts = list[PromptAtEffort]()

    # ---- building -------------------------------------------------------------------------------------------------

    @property
    def data(self) -> PromptData:
        """The run's environments and prompts."""
        return prompt_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def model(self) -> PreTrainedModel:
        """The child's causal language model inside any LoRA wrapper."""
        return without_adapters(self.child)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.trainer.default_root_dir)

    def input_identities(self) -> dict[str, Identity]:
        """Return the identities of child and parent."""
        return {"child": checkpoint_identity(self.child_folder), "parent": checkpoint_identity(self.parent_folder)}

    def setup(self, stage: str) -> None:
        """Check trainer and data, and draw the prompts of training and evaluation, before anything slow."""
        trainer, data, evaluation, settings = self.trainer, self.data, self.evaluation, self.on_policy
        ranks = ranks_of(trainer)
        check_trainer(trainer, self.training_settings.dtype)
        check_saved(self.child_folder, self.training_settings)
        check_rollouts(settings.rollouts, self.child_folder, ranks)
        size = settings.completions_per_device, settings.batches(trainer.accumulate_grad_batches)
        self.batches = RolloutBatches(data.training_pairs(), *size, ranks.rank, ranks.size, settings.sampling.seed)
        self.batches.check_updates(trainer.accumulate_grad_batches)
        count, efforts = evaluation.prompts_per_effort, list(data.efforts)
        problems = held_out_problems(data.environments, efforts, count, evaluation.seed)
        tokens = evaluation.max_new_tokens or settings.sampling.max_new_tokens
        self.held_out = SampledEvaluation(evaluation, data.environments, problems, tokens)
        data.set_aside(problem for problem, _ in problems)

    def configure_model(self) -> None:
        """Load the child as it trains, then the parent, then what samples, in this order only."""
        if self.child is not None:
            return
        assert self.batches is not None
        settings, mesh, sampling = self.training_settings, self.device_mesh, self.on_policy.sampling
        self.tokenizer = load_tokenizer(self.child_folder, padding_side="left")
        fix_date(self.tokenizer, run_date(self.run_dir))
        fix_format(self.tokenizer, "auto")
        tokens = max(sampling.max_new_tokens, self.held_out.max_new_tokens)
        pairs, context = [*self.held_out.problems, *self.batches.pairs], self.on_policy.rollouts.context_tokens
        check_lengths(self.tokenizer, pairs, self.child_folder, tokens, context)
        self.child = load_child(mesh, self.child_folder, settings)
        parent, waiting = load_for(mesh, self.parent_folder, settings.dtype, settings.attention, settings.experts)
        self.parent = parent.requires_grad_(False)
        shard(parent, parent.model.layers, mesh, waiting)
        self.sampler = ChildSampler(
            self.on_policy, self.child_folder, self.trainer, settings, self.model, self.tokenizer
        )
        self.data.train_dataloader = self.train_dataloader  # type: ignore[method-assign]  # Lightning asks it first

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the trainable parameters, and the schedule."""
        return optimize_trainable(self, self.optimizer, self.lr_scheduler)

    # ---- training -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Any:
        """Return the batches of prompts, which a resumed run continues."""
        return self.batches

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch unchanged; it contains problems only."""
        return batch

    def on_fit_start(self) -> None:
        """Put the child into training mode, without which gradient checkpointing has no effect."""
        self.child.train()

    def on_train_start(self) -> None:
        """Evaluate the child before training, unless a resumed run finds these episodes in the run folder."""
        folder = self.run_dir / "before"
        if not is_measured(folder, self.trainer.global_step):
            self._evaluate(folder, self.child_folder)

    def on_train_batch_start(self, batch: RolloutPrompts, batch_idx: int) -> None:
        """Set the random state of the checkpoint that a run resumes from (dropout draws from it)."""
        if self._resumed_random is not None:
            set_random_state(self._resumed_random, self.device)
            self._resumed_random = None

    def training_step(self, batch: RolloutPrompts, batch_idx: int) -> dict[str, Any]:
        """Return the loss of a batch and any new rollout; logged values are per token of the completions."""
        assert self.batches is not None and self.parent is not None
        try:
            outputs = self._sample(batch) if batch.batch == 0 else {}
            loss = self._train_on(batch)
        except EngineFailedError:  # a checkpoint is saved next, of the state before this batch
            self.batches.position -= 1
            release(self.model)
            raise
        return {"loss": loss, **outputs}

    def _sample(self, batch: RolloutPrompts) -> dict[str, Any]:
        """Sample a rollout; return what callbacks are told of it."""
        prompts = encode(self.tokenizer, batch.pairs)
        completions = self.sampler.sample(prompts, batch.rows)
        sums_L4 = self.trainer.strategy.reduce(totals_of(batch.pairs, completions).to(self.device), reduce_op="sum")
        batches = self.on_policy.batches(self.trainer.accumulate_grad_batches) * self.trainer.world_size
        self._rollout = Rollout(prompts, completions, mean_tokens=float(sums_L4[:, 1].sum()) / batches)
        for name, value in means_of(sums_L4).items():
            self.log(f"train/{name}", value, prog_bar=name.startswith("tokens/"), batch_size=1)
        return described(self.tokenizer, batch.pairs, completions)

    def _train_on(self, batch: RolloutPrompts) -> Tensor:
        rollout, parent = self._rollout, self.parent
        assert rollout is not None and parent is not None
        packed = packed_completions(rollout.prompts[batch.span], rollout.completions[batch.span])
        on_device = {name: tensor.to(self.device) for name, tensor in packed.items()}
        terms, log_probs_N = on_policy_loss(self.model, parent, on_device, self.loss, self.on_policy.top_k)
        if log_probs_N is not None:
            sampled_N = on_device["logprobs"][on_device["loss_mask"]]
            found = self.sampler.compare(log_probs_N, sampled_N)
            self.log_dict({f"train/{name}": value for name, value in found.items()}, batch_size=1)
        check_finite(self.trainer, terms.loss.detach(), on_device)
        values = terms.per_target()
        self._losses.append(values["loss"])
        for name in ("loss", "divergence"):
            self.log(f"train/{name}", values[name], prog_bar=name == "loss", batch_size=1)
        return terms.loss / rollout.mean_tokens

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Update the weights and check that they are finite."""
        super().optimizer_step(*arguments, **keywords)
        check_weights(self.trainer, self, self.trainer.global_step + 1)  # Lightning counts this update afterwards

    # ---- evaluating -----------------------------------------------------------------------------------------------

    def _evaluate(self, folder: Path, child: Path) -> None:
        engine, is_writer = self.sampler.engine(self.evaluation.batch_size), self.trainer.is_global_zero
        self.held_out.write(folder, child, engine, self.tokenizer, is_writer)

    def validation_step(self, batch: list[PromptAtEffort], batch_idx: int) -> None:
        """Collect the problems; every process gets all."""
        self._validation_prompts += batch

    def on_validation_epoch_end(self) -> None:
        """Solve the collected problems together; log accuracy, score and numbers per effort."""
        pairs, self._validation_prompts = self._validation_prompts, []
        engine = self.sampler.engine(self.evaluation.batch_size)
        values = validation_values(self.held_out.solve(pairs, engine, self.tokenizer))
        values["val/score"] = length_score(values, self.on_policy.best_within, known_lengths(self.child_folder))
        self.log("val/accuracy", values.pop("val/accuracy"), prog_bar=True, batch_size=len(pairs), sync_dist=True)
        self.log_dict(values, batch_size=len(pairs), sync_dist=True)

    def on_fit_end(self) -> None:
        """Write the child from the best weights, load and evaluate what was written, and fill `results`."""
        load_best(self)
        is_writer, target, tenth = self.trainer.is_global_zero, self.run_dir / "child", max(1, len(self._losses) // 10)
        save_child(self.child_folder, target, self.model, is_writer)
        self.trainer.strategy.barrier("child written")
        release_optimizers(self.trainer)
        if self.evaluation.engine is None and self.sampler.vllm is not None:
            self.sampler.read_folder(target)
        elif self.evaluation.engine is None:
            self.child = reload_child(self.device_mesh, target, self.training_settings, self.device)
            self.sampler.use(self.model)
        self._evaluate(self.run_dir / "after", target)
        self.results = self.held_out.results(self.run_dir, self.child_folder)
        self.results |= {"loss/first": fmean(self._losses[:tenth]), "loss/last": fmean(self._losses[-tenth:])}
        if is_writer:
            print_table(self.results)

    # ---- resuming -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen parameters; add random states, losses and the rollout, unless only weights are saved."""
        drop_frozen(self, checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint["processes"] = state_of_all(self.device, self._rollout, self._losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with losses, rollout and random states of the checkpoint."""
        own = own_state(checkpoint["processes"], self.trainer.global_rank, self.trainer.world_size)
        self._resumed_random, self._rollout, self._losses = own
