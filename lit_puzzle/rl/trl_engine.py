"""The one module that uses TRL's internals: a `trl.GRPOTrainer` as rollout, reward and loss engine (trl 1.16).

The trainer's own loop never runs. A LightningModule calls `loss(batch)` and drives the optimization; its weights equal
those of `GRPOTrainer.train()` bit for bit. Sampling and shuffling use a random state of their own on each process, so
that validation cannot change training and a resumed run continues bit for bit.

Reads and writes nothing (TRL's reports, checkpoints and telemetry are off).
Source: GRPO, arXiv 2402.03300, as implemented by TRL.

Shapes: B completions of a generation batch on this process, N on all.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed import all_gather_object, get_world_size, is_initialized
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_callable_name

from lit_puzzle.environments.environment import LEVELS
from lit_puzzle.rl.loader import ResumableLoader
from lit_puzzle.rl.reward_checks import Faults, checked_reward
from lit_puzzle.rl.rewards import RewardFunction
from lit_puzzle.rl.settings import GRPOSettings
from lit_puzzle.rl.shared_rewards import complete, is_shared
from lit_puzzle.training.finite import ADVICE, raise_together
from lit_puzzle.training.random_state import RandomStream
from lit_puzzle.training.trainer_validation import PRECISIONS

Rows = list[dict[str, Any]]


def trl_precision(precision: str) -> dict[str, bool]:
    """Return TRL's flags for Lightning's `trainer.precision`.

    TRL's flags mean autocast around the model, which Lightning calls mixed. Lightning's `*-true` would turn trained
    weights into half precision, which rounds small steps away; frozen weights have the dtype of the module's settings.

    Raises:
        ValueError: a precision in which a policy cannot be trained.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision} was given; reinforcement learning supports {PRECISIONS}.")
    return {"bf16": precision == "bf16-mixed", "fp16": False}


def grpo_config(
    settings: GRPOSettings,
    accumulate_grad_batches: int,
    precision: str,
    device: torch.device,
    output_dir: Path,
    reward_weights: Sequence[float],
) -> GRPOConfig:
    """Return TRL's configuration of an update.

    Call it after the process group exists; TRL would open one of its own.

    Args:
        settings: the update.
        accumulate_grad_batches: slices of an update (`trainer.accumulate_grad_batches`).
        precision: `trainer.precision`.
        device: device of this process.
        output_dir: folder that TRL requires; nothing is written into it.
        reward_weights: weight of each reward function.

    Raises:
        ValueError: a precision that cannot be trained, or another device than TRL's.
    """
    sampling, loss = settings.sampling, settings.loss
    config = GRPOConfig(
        output_dir=str(output_dir),
        seed=sampling.seed,
        use_cpu=device.type == "cpu",
        **trl_precision(precision),
        gradient_checkpointing=False,  # `load_child` enables it on the policy
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        router_aux_loss_coef=0.0,  # None would add the model config's own value to the loss
        per_device_train_batch_size=settings.completions_per_device,
        gradient_accumulation_steps=accumulate_grad_batches,
        steps_per_generation=settings.steps_per_generation,
        num_generations=settings.num_generations,
        num_iterations=settings.num_iterations,
        max_completion_length=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        loss_type=loss.loss_type,
        epsilon=loss.epsilon,
        epsilon_high=loss.epsilon_high,
        importance_sampling_level=loss.importance_sampling_level,
        scale_rewards=loss.scale_rewards,
        beta=loss.beta,
        mask_truncated_completions=loss.mask_truncated_completions,
        multi_objective_aggregation=loss.aggregation,
        reward_weights=list(reward_weights),
    )
    if config.device.type == "cuda" and config.n_gpu > 1:
        config._n_gpu = 1  # Lightning chooses the GPUs; without this TRL would use DataParallel on all
    if config.device.type != device.type or (device.type == "cuda" and config.device != device):
        raise ValueError(
            f"TRL uses {config.device}, the strategy {device}. "
            "Choose GPUs with CUDA_VISIBLE_DEVICES, not by number in trainer.devices."
        )
    return config


class _Trainer(GRPOTrainer):
    """GRPOTrainer with a context around rollouts, a record of the last rollout, checked rewards, and no telemetry."""

    faults: Faults
    rollout_context: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)
    rollout: dict[str, Any] | None = None
    functions: Sequence[RewardFunction] = ()

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with self.rollout_context():
                return super()._generate_single_turn(*args, **kwargs)
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # torch.multinomial: inf, nan or element < 0
                raise
            update = self.state.global_step + 1
            raise ValueError(
                f"The policy's logits are not finite in the rollout of update {update}. {ADVICE}"
            ) from error

    def _calculate_rewards(self, inputs: Rows, prompts: Any, completions: Any, completion_ids: list[list[int]]) -> Any:
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self.rollout = {
            "completion_lengths": torch.tensor([len(ids) for ids in completion_ids]),
            "truncated": torch.tensor([ids[-1] not in ends for ids in completion_ids]),
            "effort": [row["effort"] for row in inputs],
            "environment": [row["environment"] for row in inputs],
            "prompt": [row["prompt"] for row in inputs],
            "answer": [row.get("answer", "") for row in inputs],
            "completion_ids": completion_ids,
        }
        self.faults.found.clear()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        raise_together(next(iter(self.faults.found), None))
        if any(is_shared(function) for function in self.functions):
            own = [[len(ids), LEVELS.index(row["effort"])] for ids, row in zip(completion_ids, inputs, strict=True)]
            tokens_N, levels_N = self.accelerator.gather(torch.tensor(own, device=rewards.device)).T
            complete(self.functions, rewards, tokens_N.contiguous(), levels_N, self.num_generations)
        return rewards

    def _send_telemetry(self) -> None:
        """Send nothing."""


class GRPOEngine:
    """Rollouts, rewards and loss of one process.

    Args:
        policy: the model, frozen, wrapped by LoRA and sharded as it will be trained.
        tokenizer: its tokenizer; padding is put to the left.
        prompts: columns prompt (text), effort, environment, and the columns that rewards read.
        rewards: reward functions; the first one grades, where one of them is a `GroupLength`.
        config: configuration from `grpo_config`.
        rollout_context: context around generation (`unsharded`).

    Attributes:
        loader: loader of the prompts, which resumes.
    """

    def __init__(
        self,
        policy: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Dataset,
        rewards: Sequence[RewardFunction],
        config: GRPOConfig,
        rollout_context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        tokenizer.padding_side = "left"
        self.policy, self.config = policy, config
        # With beta set, TRL's constructor copies the adapters into a second, frozen set, which fails on sharded ones.
        # Without that set TRL switches the adapters off for the reference: the same model, because they start at zero.
        beta, config.beta = config.beta, 0.0
        faults = Faults(prompts["prompt"])
        functions = [checked_reward(reward, get_callable_name(reward), faults) for reward in rewards]
        with _outer_random_state(config.device):
            self._trainer = _Trainer(
                model=policy, reward_funcs=functions, args=config, train_dataset=prompts, processing_class=tokenizer
            )
            self.stream = RandomStream(config.device)
        config.beta = self._trainer.beta = beta
        self._trainer.faults = faults
        self._trainer.functions = list(rewards)
        self._trainer.rollout_context = rollout_context
        self._trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
        self.loader = ResumableLoader(self._trainer.get_train_dataloader, self.stream.inside, self.stream.fork)

    def loss(self, batch: Rows, global_step: int) -> Tensor:
        """Return the loss of the next slice; generates completions first when the previous ones are used up.

        Args:
            batch: prompts of a generation batch, from `loader`.
            global_step: number of updates so far.

        Returns:
            Scalar loss, divided by the gradient accumulation, as in TRL.

        Raises:
            ValueError: a policy in evaluation mode, or a reward that is not one finite number for each completion.
        """
        if not self.policy.training:
            raise ValueError(
                "The policy is in evaluation mode, in which TRL neither buffers nor accumulates. Call train()."
            )
        trainer = self._trainer
        trainer.state.global_step = global_step
        with self.stream.inside():
            inputs = trainer._prepare_inputs(batch)
            loss = trainer.compute_loss(self.policy, inputs)
        trainer._step += 1
        return loss

    def take_rollout(self) -> dict[str, Any]:
        """Return once what the last `loss` generated on this process; empty if it used earlier completions.

        Returns:
            `completion_lengths` (long [B]) and `truncated` (bool [B]: reached the cap), `completion_ids` (B lists),
            `effort`, `environment`, `prompt` and `answer` (B texts each), of the whole generation batch.
        """
        rollout, self._trainer.rollout = self._trainer.rollout, None
        return rollout or {}

    def metrics(self) -> dict[str, float]:
        """Return means of TRL's metrics since the last call, over all processes; NaN values are left out."""
        metrics = self._trainer._metrics["train"]
        numbers = {key: [value for value in values if not math.isnan(value)] for key, values in metrics.items()}
        metrics.clear()
        return {key: sum(values) / len(values) for key, values in numbers.items() if values}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resuming needs beside weights, optimizer and loader.

        Every process must call it.

        Returns:
            `processes`: a list with one entry per process, the same on all, of tensors and plain Python objects.
        """
        trainer = self._trainer
        buffered = trainer._buffered_inputs
        own = {
            "random": self.stream.state,
            "step": trainer._step,
            "tokens_seen": trainer.state.num_input_tokens_seen,
            "buffered": None if buffered is None else [_to(inputs, torch.device("cpu")) for inputs in buffered],
        }
        processes: list[Any] = [own]
        if is_initialized() and get_world_size() > 1:
            processes = [None] * get_world_size()
            all_gather_object(processes, own)
        return {"processes": processes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: a state of another number of processes, whose random states cannot be continued.
        """
        saved, config = state["processes"], self.config
        if len(saved) != config.world_size:
            raise ValueError(
                f"The checkpoint was written by {len(saved)} processes, this run has {config.world_size}. "
                "Resume with the same trainer.devices and num_nodes, or start again with --overwrite."
            )
        own = saved[config.process_index]
        self.stream.state = own["random"]
        self._trainer._step = own["step"]
        self._trainer.state.num_input_tokens_seen = own["tokens_seen"]
        buffered = own["buffered"]
        self._trainer._buffered_inputs = None if buffered is None else [_to(part, config.device) for part in buffered]


def _to(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


@contextmanager
def _outer_random_state(device: torch.device) -> Iterator[None]:
    """Restore the global random state afterwards: TRL's constructor seeds all generators."""
    stream = RandomStream(device)
    with stream.fork():
        yield
