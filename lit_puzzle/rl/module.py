"""Reinforcement learning that recovers a pruned child: a LightningModule around TRL's GRPO engine.

Lightning drives optimization, sharding, logging and checkpoints; the engine gives rollouts, rewards and the loss. The
child is measured on held-out prompts before training; after it, with the best validated weights as they were saved
(rounded, adapters merged), on the same prompts. Validation asks others.

Reads: the child's folder. Writes into the run folder: `before/`, `after/` (episodes), `child/` (the recovered child).
Per process, with P weights of b bytes, T of them trained, L layers, N processes, B completions of t tokens (prompt
included), hidden size d, vocabulary V, m completions decoded together, M measured problems:
  Memory: (P b + 12 T) / N (gradient, Adam) + rollouts P b if gathered, else 2 P b / L, and the KV cache of m t tokens
    + training activations, B t (L d c + 2 V) * 4 bytes, c about 20 (2 with gradient checkpointing).
  Disk: child P b + 12 T per checkpoint to resume from, 4 T per best + 120 bytes per measured problem, twice.
  Traffic: of a slice, gathers 2 P b and gradients 4 T; of a rollout, P b if gathered, else P b per decoded token;
    of a measurement, the same as a rollout and M / N episodes; of the end, 4 T twice.
Results: `accuracy/<effort>/before|after`, `.../before_se|after_se`, `accuracy/<effort>/gain|gain_se`,
`tokens/<effort>/before|after`, `reward/first|last`.
Source: arXiv 2602.11937, the RL recovery; GRPO, arXiv 2402.03300.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from lit_puzzle.child.save import become_saved, save_child
from lit_puzzle.data.rl_prompts import PromptData
from lit_puzzle.environments.environment import PromptAtEffort
from lit_puzzle.evaluate.accuracy import Episode, read_episodes
from lit_puzzle.evaluate.before_after import (
    EvaluationSettings,
    print_table,
    recovery_results,
    solve_together,
    validation_values,
    write_evaluation,
)
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.model.loading import DtypeName
from lit_puzzle.rl.rewards import RewardSettings, build_rewards
from lit_puzzle.rl.settings import GRPOSettings
from lit_puzzle.run.folder import require_input
from lit_puzzle.training.best_weights import load_best
from lit_puzzle.training.sharding import load_for, shard, unsharded
from lit_puzzle.training.trainable import FROZEN, LoraSettings, freeze_parameters, optimize_trainable
from lit_puzzle.training.trainer_validation import check_trainer


class RLRecovery(LightningModule):
    """Recovers a child by GRPO on verifiable rewards.

    Args:
        child: folder of the child: weights, configuration, tokenizer with a chat template.
        grpo: the update.
        rewards: weights of the built-in rewards.
        extra_rewards: more reward functions in TRL's form, of weight 1.
        freeze: patterns of parameters that are not trained; by default experts and router.
        lora: trains low-rank adapters instead; everything else is then frozen.
        evaluation: the measurement before and after.
        optimizer: builds the optimizer on the trainable parameters.
        lr_scheduler: builds the schedule, stepped once per update.
        dtype: dtype in which the weights are loaded; those that train are kept in float32, because a step of a small
            learning rate is less than bfloat16 can tell apart.
        attention: attention of the training passes; decoding is eager.
        experts: implementation of the experts.
        seed: of shuffling and sampling.

    Raises:
        ValueError: settings that cannot work together, or a child that is not there.
    """

    def __init__(
        self,
        child: Path,
        grpo: GRPOSettings = GRPOSettings(),  # noqa: B008  (frozen)
        rewards: RewardSettings = RewardSettings(),  # noqa: B008
        extra_rewards: list[Callable[..., list[float]]] | None = None,
        freeze: list[str] | None = None,
        lora: LoraSettings | None = None,
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str = "sink_attention",
        experts: str = "grouped_mm",
        seed: int = 0,
    ) -> None:
        super().__init__()
        child = require_input(child, "child")
        if not (child / "config.json").is_file():
            raise ValueError(f"{child} holds no child (config.json). `lightning run recipes/assemble.yaml` makes one.")
        if grpo.beta > 0 and lora is None:
            raise ValueError(f"grpo.beta={grpo.beta} needs `lora` (adapter off = reference). Set beta: 0 or give lora.")
        self.child, self.grpo, self.rewards, self.lora = child, grpo, rewards, lora
        self.extra_rewards, self.freeze_patterns = extra_rewards or [], FROZEN if freeze is None else freeze
        self.evaluation, self.optimizer, self.lr_scheduler = evaluation, optimizer, lr_scheduler
        self.dtype_name: DtypeName = dtype
        self.attention, self.experts, self.seed = attention, experts, seed
        self.strict_loading = False  # checkpoints hold trainable parameters only
        self.results: dict[str, float] = {}
        self.policy: Any = None  # the model, inside a LoRA wrapper if there is one
        self._reward_history: list[float] = []
        self._asked: list[PromptAtEffort] = []
        self._measured: list[PromptAtEffort] = []

    # ---- building -------------------------------------------------------------------------------------------------

    @property
    def data(self) -> PromptData:
        """The run's environments and prompts."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PromptData):
            raise ValueError(
                f"RLRecovery was given data {type(data).__name__}; it needs lit_puzzle.data.rl_prompts.PromptData."
            )
        return data

    @property
    def model(self) -> PreTrainedModel:
        """The causal language model inside any LoRA wrapper."""
        from peft import PeftModel

        return self.policy.get_base_model() if isinstance(self.policy, PeftModel) else self.policy

    def setup(self, stage: str) -> None:
        """Checks what depends on trainer and data, and draws the prompts of the measurement, before anything slow."""
        trainer = self.trainer
        check_trainer(trainer, self.dtype_name)
        self.grpo.check_batch(trainer.accumulate_grad_batches, trainer.world_size, self.data.num_train_prompts)
        data, measured = self.data, self.evaluation
        self._measured = held_out_problems(
            data.environments, list(data.efforts), measured.prompts_per_effort, measured.seed
        )
        data.set_aside(problem for problem, _ in self._measured)

    def configure_model(self) -> None:
        """Loads, freezes, adapts and shards the policy, then builds the engine on it (in this order only)."""
        if self.policy is not None:
            return
        self.tokenizer = AutoTokenizer.from_pretrained(self.child, padding_side="left")
        self.policy, waiting = load_for(self.device_mesh, self.child, self.dtype_name, self.attention, self.experts)
        if self.lora is None:
            freeze_parameters(self.model, self.freeze_patterns)
        else:
            self.policy = self.lora.wrap(self.model)
        if self.grpo.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(self.model, self.model.model.layers, self.device_mesh, waiting, trains=True)
        if not self.grpo.unshard_rollouts:
            self.model._is_fsdp_managed_module = True  # generation then keeps the ranks in step
        self._build_engine()

    def _build_engine(self) -> None:
        from lit_puzzle.rl.trl_engine import GRPOEngine, grpo_config

        trainer, data = self.trainer, self.data
        functions, weights = build_rewards(
            self.rewards, data.environments, self.tokenizer, list(data.efforts), self.child
        )
        config = grpo_config(
            self.grpo,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            precision=str(trainer.precision),
            device=trainer.strategy.root_device,
            output_dir=self.run_dir,
            seed=self.seed,
            reward_weights=[*weights, *[1.0] * len(self.extra_rewards)],
        )
        prompts = data.train_prompts(self.tokenizer)
        self.engine = GRPOEngine(
            self.policy, self.tokenizer, prompts, [*functions, *self.extra_rewards], config, self._generation
        )
        data.train_dataloader = self.train_dataloader  # type: ignore[method-assign]  # Lightning asks the data first

    def configure_optimizers(self) -> Any:
        """Optimizer over the trainable parameters; the schedule counts updates."""
        return optimize_trainable(self, self.optimizer, self.lr_scheduler)

    # ---- training -------------------------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.trainer.default_root_dir)

    def train_dataloader(self) -> Any:
        """TRL's prompts, each repeated for its group, from where a resumed run stopped."""
        return self.engine.loader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are texts and problems: nothing to move."""
        return batch

    def on_fit_start(self) -> None:
        """A policy in evaluation mode would silently take TRL's evaluation path."""
        self.policy.train()

    def on_train_start(self) -> None:
        """Measures the child once; a resumed run finds the episodes in the run folder."""
        if (self.run_dir / "before").is_dir():
            return
        if self.trainer.global_step > 0:
            raise ValueError(f"{self.run_dir / 'before'} is gone: there is nothing to compare with. Use --overwrite.")
        write_evaluation(self.run_dir / "before", self._solve(self._measured), self.trainer.is_global_zero)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """The loss of one slice (times the accumulation: TRL and Lightning both divide), and any new rollout."""
        loss = self.engine.loss(batch, self.trainer.global_step) * self.trainer.accumulate_grad_batches
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return {"loss": loss, **self.engine.take_rollout()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs what TRL measured since the last update."""
        metrics = self.engine.metrics()
        shown = {"reward": metrics.pop("reward", None), "tokens": metrics.pop("completions/mean_length", None)}
        for name, value in shown.items():
            if value is not None:
                self.log(f"train/{name}", value, prog_bar=True, batch_size=1)
        if shown["reward"] is not None:
            self._reward_history.append(shown["reward"])
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=1)

    # ---- measuring ------------------------------------------------------------------------------------------------

    def _generation(self) -> Any:
        """Context of every generation: a sharded model is gathered once, if it fits."""
        return unsharded(self.model) if self.grpo.unshard_rollouts else nullcontext()

    def _solve(self, pairs: list[PromptAtEffort]) -> list[Episode]:
        """Solve problems greedily, all processes together; leave randomness, modes and gradients as they were."""
        settings, environments = self.evaluation, self.data.environments
        tokens = settings.max_new_tokens or self.grpo.max_completion_length
        with (
            torch.inference_mode(False),  # validation runs in it; its tensors could not take part in a later backward
            torch.no_grad(),
            self._generation(),
            self.trainer.precision_plugin.forward_context(),
        ):
            engine = TransformersEngine(self.model, self.tokenizer, settings.batch_size)
            return solve_together(engine, self.tokenizer, pairs, environments, tokens)

    def validation_step(self, batch: list[PromptAtEffort], batch_idx: int) -> None:
        """Collects the problems; every process gets all."""
        self._asked += batch

    def on_validation_epoch_end(self) -> None:
        """Solve the collected problems together; log accuracy and, per effort, accuracy and tokens."""
        pairs, self._asked = self._asked, []
        values = validation_values(self._solve(pairs))
        self.log("val/accuracy", values.pop("val/accuracy"), prog_bar=True, batch_size=len(pairs), sync_dist=True)
        self.log_dict(values, batch_size=len(pairs), sync_dist=True)

    def on_fit_end(self) -> None:
        """Writes the recovered child from the best weights, measures what was written and fills `results`."""
        load_best(self)
        is_writer = self.trainer.is_global_zero
        save_child(self.child, self.run_dir / "child", self.model, is_writer)
        become_saved(self.model, self.child)
        before, after = read_episodes(self.run_dir / "before"), self._solve(self._measured)
        write_evaluation(self.run_dir / "after", after, is_writer)
        self.results = recovery_results(before, after, self._reward_history)
        if is_writer:
            print_table(self.results)

    # ---- resuming -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the engine (unless only weights are saved) and drops frozen parameters."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state: dict[str, Tensor] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in trainable}
        if "optimizer_states" in checkpoint:
            checkpoint["engine"] = self.engine.state_dict()
            checkpoint["reward_history"] = list(self._reward_history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues the engine where the checkpoint left it."""
        self.engine.load_state_dict(checkpoint["engine"])
        self._reward_history = list(checkpoint["reward_history"])
