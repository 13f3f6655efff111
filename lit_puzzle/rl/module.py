"""Reinforcement learning that recovers a pruned child: a LightningModule around TRL's GRPO engine.

Lightning drives optimization, sharding, logging and checkpoints; the engine provides rollouts, rewards and the loss.
The child is evaluated on held-out prompts before training; the folder that the run writes (the best validated weights,
rounded, adapters merged) is loaded and evaluated on the same prompts. Validation uses other held-out prompts.

Reads the child's folder. Writes into the run folder: `before/`, `after/` (episodes), `child/` (the recovered child).
Per process, with P weights of b bytes, T of them trained, L layers, N processes, B completions of t tokens (prompt
included), hidden size d, vocabulary V, m completions decoded together, M evaluated problems:
  Memory: (P b + 12 T) / N (gradient, Adam) + rollouts P b if gathered, else 2 P b / L, and the KV cache of m t tokens
    + training activations, B t (L d c + 2 V) * 4 bytes, c about 20 (2 with gradient checkpointing).
    At the end the saved child, P b / N, in place of gradients and Adam's states. vLLM: `generation.rollout_engine`.
  Disk: child P b + 12 T per checkpoint to resume from, 4 T per best + 200 bytes and texts a problem, twice.
  Traffic: of a slice, gathers 2 P b, gradients 4 T; of a rollout P b if gathered, else P b a token; of an evaluation,
    the same and M / N episodes; of the end, 4 T twice.
Results: `recovery_results`. Source: arXiv 2602.11937, the RL recovery; GRPO, arXiv 2402.03300.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from lit_puzzle.child.save import save_child
from lit_puzzle.child.trained import check_saved
from lit_puzzle.data.prompts import check_lengths
from lit_puzzle.data.rl_prompts import PromptData, prompt_data
from lit_puzzle.environments.answer_formats import fix_format
from lit_puzzle.environments.environment import PromptAtEffort
from lit_puzzle.evaluate.before_after import (
    EvaluationSettings,
    is_measured,
    print_table,
    validation_values,
)
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.evaluate.sampled_evaluation import SampledEvaluation
from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.lengths import LENGTHS_FILE, known_lengths
from lit_puzzle.generation.rollout_checks import check_rollouts
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.model.chat import fix_date
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.rl.length_rewards import budget_score
from lit_puzzle.rl.rewards import Weighted, build_rewards, length_rewards
from lit_puzzle.rl.settings import ExtraReward, GRPOSettings, RewardSettings
from lit_puzzle.rl.vllm_rollouts import VLLMRollouts, start_rollouts
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.inputs import run_date
from lit_puzzle.training.best_weights import load_best
from lit_puzzle.training.finite import check_loss, check_weights
from lit_puzzle.training.load_child import load_child, reload_child
from lit_puzzle.training.rollouts import ranks_of
from lit_puzzle.training.settings import TrainingSettings
from lit_puzzle.training.sharding import unsharded
from lit_puzzle.training.trainable import drop_frozen, optimize_trainable, release_optimizers, without_adapters
from lit_puzzle.training.trainer_validation import check_trainer


class RLRecovery(LightningModule):
    """Recovers a child by GRPO on verifiable rewards.

    Args:
        child: folder of the child: weights, configuration, tokenizer with a chat template.
        grpo: rollouts and loss of an update.
        rewards: weights of the built-in rewards.
        extra_rewards: further reward functions and their weights.
        training: what trains, in which dtype and by which implementations.
        evaluation: the evaluation before and after.
        optimizer: builds the optimizer on the trainable parameters.
        lr_scheduler: builds the schedule, stepped once per update.

    Raises:
        ValueError: settings that do not fit together, or a missing child.
    """

    def __init__(
        self,
        child: Path,
        grpo: GRPOSettings = GRPOSettings(),  # noqa: B008  (frozen)
        rewards: RewardSettings = RewardSettings(),  # noqa: B008
        extra_rewards: list[ExtraReward] | None = None,
        training: TrainingSettings = TrainingSettings(),  # noqa: B008
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        child = require_input(child, "child", "config.json")
        if grpo.loss.beta > 0 and training.lora is None:
            raise ValueError(f"grpo.loss.beta={grpo.loss.beta} needs `training.lora` (adapter off = reference), or 0.")
        self.child, self.grpo, self.rewards, self.extra_rewards = child, grpo, rewards, extra_rewards or []
        self.training_settings, self.evaluation = training, evaluation
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.parent_lengths = rewards.budget.parent or child  # folder
        self.strict_loading = False  # checkpoints contain trainable parameters only
        self.results: dict[str, float] = {}
        self.rollouts: VLLMRollouts | None = None
        self.policy: Any = None  # the model, inside a LoRA wrapper if there is one
        self._reward_history, self._length_rewards = list[float](), list[Weighted]()
        self._validation_prompts = list[PromptAtEffort]()

    # ---- building -------------------------------------------------------------------------------------------------

    @property
    def data(self) -> PromptData:
        """The run's environments and prompts."""
        return prompt_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def model(self) -> PreTrainedModel:
        """The causal language model inside any LoRA wrapper."""
        return without_adapters(self.policy)

    def input_identities(self) -> dict[str, Identity]:
        """Return the identity of the child, and of the parent's lengths where they are not the child's."""
        child = {"child": checkpoint_identity(self.child)}
        given = self.parent_lengths != self.child
        return child | ({"parent_lengths": file_identity(self.parent_lengths, [LENGTHS_FILE])} if given else {})

    def setup(self, stage: str) -> None:
        """Check trainer and data, and draw the prompts of the evaluation, before anything slow."""
        trainer, data, evaluation = self.trainer, self.data, self.evaluation
        check_trainer(trainer, self.training_settings.dtype)
        check_saved(self.child, self.training_settings)
        check_rollouts(self.grpo.rollouts, self.child, ranks_of(trainer))
        self.grpo.check_batch(trainer.accumulate_grad_batches, trainer.world_size, data.num_train_prompts)
        cap, efforts = self.grpo.sampling.max_new_tokens, list(data.efforts)
        self._length_rewards = length_rewards(self.rewards, efforts, self.parent_lengths, cap)
        problems = held_out_problems(data.environments, efforts, evaluation.prompts_per_effort, evaluation.seed)
        self.held_out = SampledEvaluation(evaluation, data.environments, problems, evaluation.max_new_tokens or cap)
        data.set_aside(problem for problem, _ in problems)

    def configure_model(self) -> None:
        """Load the policy as it trains, then build the engine on it, in this order only."""
        if self.policy is not None:
            return
        self.tokenizer = load_tokenizer(self.child, padding_side="left")
        fix_date(self.tokenizer, run_date(self.run_dir))
        fix_format(self.tokenizer, self.rewards.answer_format)
        tokens = max(self.grpo.sampling.max_new_tokens, self.held_out.max_new_tokens)
        pairs = self.held_out.problems + self.data.training_pairs()
        check_lengths(self.tokenizer, pairs, self.child, tokens, self.grpo.rollouts.context_tokens)
        self._set_policy(load_child(self.device_mesh, self.child, self.training_settings))
        self._build_engine()

    def _set_policy(self, policy: Any) -> None:
        self.policy = policy
        if not self.grpo.unshard_rollouts:
            self.model._is_fsdp_managed_module = True  # generation then runs equally many steps on all processes

    def _build_engine(self) -> None:
        from lit_puzzle.rl.trl_config import config_of
        from lit_puzzle.rl.trl_engine import GRPOEngine

        trainer, data = self.trainer, self.data
        lengths, extra = self._length_rewards, self.extra_rewards
        functions, weights = build_rewards(self.rewards, extra, data.environments, self.tokenizer, lengths)
        config, prompts = config_of(self.grpo, trainer, weights), data.train_prompts(self.tokenizer)
        self.rollouts = start_rollouts(self.grpo, self.child, trainer, self.training_settings.dtype, self.policy)
        self.engine = GRPOEngine(self.policy, self.tokenizer, prompts, functions, config, self._gathered, self.rollouts)
        self.engine.stop = self.grpo.stop
        data.train_dataloader = self.train_dataloader  # type: ignore[method-assign]  # Lightning asks the data first

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the trainable parameters, and the schedule."""
        return optimize_trainable(self, self.optimizer, self.lr_scheduler)

    # ---- training -------------------------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """Run folder."""
        return Path(self.trainer.default_root_dir)

    def train_dataloader(self) -> Any:
        """Return the loader of TRL's prompts, each repeated for its group, which a resumed run continues."""
        return self.engine.loader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch unchanged; it contains texts and problems only."""
        return batch

    def on_fit_start(self) -> None:
        """Put the policy into training mode; in evaluation mode TRL would silently take its evaluation path."""
        self.policy.train()

    def on_train_start(self) -> None:
        """Evaluate the child before training, unless a resumed run finds these episodes in the run folder.

        Raises:
            ValueError: a resumed run without these episodes.
        """
        folder = self.run_dir / "before"
        if not is_measured(folder, self.trainer.global_step):
            self._evaluate(folder, self.child)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return the loss of a slice (times the accumulation: TRL and Lightning both divide) and any new rollout.

        Raises:
            TrainingStoppedError: see `GRPOEngine.loss`.
        """
        step = self.trainer.global_step
        loss = self.engine.loss(batch, step, lambda loss: check_loss(self.trainer, loss))
        loss = loss * self.trainer.accumulate_grad_batches
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return {"loss": loss, **self.engine.take_rollout()}

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Update the weights and check that they are finite."""
        super().optimizer_step(*arguments, **keywords)
        check_weights(self.trainer, self, self.trainer.global_step + 1)  # Lightning counts this update afterwards

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log TRL's metrics since the last update."""
        metrics = self.engine.metrics()
        if "completions/mean_length" in metrics:
            metrics["tokens"] = metrics.pop("completions/mean_length")
        if "reward" in metrics:
            self._reward_history.append(metrics["reward"])
        for name, value in metrics.items():
            self.log(f"train/{name}", value, prog_bar=name == "reward" or name.startswith("tokens/"), batch_size=1)

    # ---- evaluating -----------------------------------------------------------------------------------------------

    def _gathered(self) -> Any:
        """Return the context of generation by the policy, in which a sharded model is gathered once if it fits."""
        gathers = self.grpo.unshard_rollouts and self.rollouts is None
        return unsharded(self.model) if gathers else nullcontext()

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        """Make what generates with the policy's weights of now; leave randomness, modes and gradients as they were."""
        with (
            torch.inference_mode(False),  # validation runs in it; its tensors could not take part in a later backward
            torch.no_grad(),
            self._gathered(),
            self.trainer.precision_plugin.forward_context(),
        ):
            if self.rollouts:
                yield self.rollouts.current_engine()
            else:
                yield TransformersEngine(self.model, self.tokenizer, self.evaluation.batch_size)

    def _evaluate(self, folder: Path, child: Path) -> None:
        self.held_out.write(folder, child, self._engine(), self.tokenizer, self.trainer.is_global_zero)

    def validation_step(self, batch: list[PromptAtEffort], batch_idx: int) -> None:
        """Collect the problems; every process gets all."""
        self._validation_prompts += batch

    def on_validation_epoch_end(self) -> None:
        """Solve the collected problems together; log accuracy, score and numbers per effort."""
        pairs, self._validation_prompts = self._validation_prompts, []
        values = validation_values(self.held_out.solve(pairs, self._engine(), self.tokenizer))
        values["val/score"] = budget_score(values, self.rewards.budget, known_lengths(self.parent_lengths))
        self.log("val/accuracy", values.pop("val/accuracy"), prog_bar=True, batch_size=len(pairs), sync_dist=True)
        self.log_dict(values, batch_size=len(pairs), sync_dist=True)

    def on_fit_end(self) -> None:
        """Write the recovered child from the best weights, load and evaluate what was written, and fill `results`."""
        load_best(self)
        is_writer, target = self.trainer.is_global_zero, self.run_dir / "child"
        save_child(self.child, target, self.model, is_writer)
        self.trainer.strategy.barrier("child written")
        release_optimizers(self.trainer)
        if self.evaluation.engine is None:
            if self.rollouts:
                self.rollouts.read_folder(target)
            else:
                self._set_policy(reload_child(self.device_mesh, target, self.training_settings, self.device))
        self._evaluate(self.run_dir / "after", target)
        self.results = self.held_out.results(self.run_dir, self.parent_lengths, self._reward_history)
        if is_writer:
            print_table(self.results)

    # ---- resuming -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen parameters; add the engine's state, unless only weights are saved."""
        drop_frozen(self, checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint["engine"] = self.engine.state_dict()
            checkpoint["reward_history"] = list(self._reward_history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the engine's state of the checkpoint."""
        self.engine.load_state_dict(checkpoint["engine"])
        self._reward_history = list(checkpoint["reward_history"])
