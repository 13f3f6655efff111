"""The only file that touches TRL's internals: a `trl.GRPOTrainer` as rollout, reward and loss engine (trl 1.16).

The trainer's own loop never runs. A LightningModule asks for `loss(batch)`, drives optimization itself, and gets the
weights that `GRPOTrainer.train()` would have reached, bit for bit. Everything random (sampling, shuffling) happens on a
stream of its own per process, so validation cannot change training and a resumed run continues bit for bit.

Symbols: B completions of one slice, G completions per prompt, P prompt tokens, C completion tokens.
Reads: nothing. Writes: nothing (TRL's reports, checkpoints and telemetry are off).
Source: GRPO, arXiv 2402.03300, as implemented by TRL; the resume rule is ours.
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

from lit_puzzle.rl.loader import ResumableLoader
from lit_puzzle.rl.rewards import RewardFunction
from lit_puzzle.rl.settings import GRPOSettings
from lit_puzzle.training.random_state import RandomStream
from lit_puzzle.training.trainer_validation import PRECISIONS

Rows = list[dict[str, Any]]


def trl_precision(precision: str) -> dict[str, bool]:
    """Lightning's `trainer.precision` -> TRL's flags: the one place where the two are mapped.

    TRL's flags mean autocast around the model, which is what Lightning calls mixed. Lightning's `*-true` would turn
    trained weights into half precision, in which small steps are lost; the frozen ones get theirs by `dtype`.

    Raises:
        ValueError: a precision in which a policy cannot be trained here.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision} was given; reinforcement learning knows {PRECISIONS}.")
    return {"bf16": precision == "bf16-mixed", "fp16": False}


def grpo_config(
    settings: GRPOSettings,
    accumulate_grad_batches: int,
    precision: str,
    device: torch.device,
    output_dir: Path,
    seed: int,
    reward_weights: Sequence[float],
) -> GRPOConfig:
    """TRL's configuration of an update; call it only after the process group exists, for it joins or opens one."""
    config = GRPOConfig(
        output_dir=str(output_dir),
        seed=seed,
        use_cpu=device.type == "cpu",
        **trl_precision(precision),
        gradient_checkpointing=False,  # the module enables it on the policy; TRL only has to respect it
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
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        loss_type=settings.loss_type,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        importance_sampling_level=settings.importance_sampling_level,
        scale_rewards=settings.scale_rewards,
        beta=settings.beta,
        mask_truncated_completions=settings.mask_truncated_completions,
        reward_weights=list(reward_weights),
    )
    if config.device.type == "cuda" and config.n_gpu > 1:
        config._n_gpu = 1  # one process sees several GPUs: Lightning decides how many are used, not DataParallel
    if config.device.type != device.type or (device.type == "cuda" and config.device != device):
        raise ValueError(
            f"TRL works on {config.device}, the strategy on {device}. "
            "Choose GPUs with CUDA_VISIBLE_DEVICES, not by number in trainer.devices."
        )
    return config


class _Trainer(GRPOTrainer):
    """GRPOTrainer with a context around rollouts, a record of the last one, and no telemetry."""

    rollout_context: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)
    rollout: dict[str, Any] | None = None

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.rollout_context():
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs: Rows, prompts: Any, completions: Any, completion_ids: list[list[int]]) -> Any:
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self.rollout = {
            "completion_lengths": torch.tensor([len(ids) for ids in completion_ids]),
            "truncated": torch.tensor([ids[-1] not in ends for ids in completion_ids]),
            "effort": [row["effort"] for row in inputs],
            "environment": [row["environment"] for row in inputs],
        }
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids)

    def _send_telemetry(self) -> None:
        """A training run on a cluster tells nobody about itself."""


class GRPOEngine:
    """Rollouts, rewards and loss of one process.

    Args:
        policy: the model, already frozen, wrapped by LoRA and sharded as it will be trained.
        tokenizer: its tokenizer; padding goes to the left.
        prompts: columns prompt (text), effort, environment, and whatever the rewards read.
        rewards: reward functions.
        config: from `grpo_config`.
        rollout_context: context around generation (`unsharded`).
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
        # Told of beta, TRL would copy the adapters into a frozen second set, which fails on sharded ones; without that
        # set it switches the adapters off for the reference: the same model, as they start at zero.
        beta, config.beta = config.beta, 0.0
        with _outer_random_state(config.device):
            self._trainer = _Trainer(
                model=policy, reward_funcs=list(rewards), args=config, train_dataset=prompts, processing_class=tokenizer
            )
            self.stream = RandomStream(config.device)
        config.beta = self._trainer.beta = beta
        self._trainer.rollout_context = rollout_context
        self._trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
        self.loader = ResumableLoader(self._trainer.get_train_dataloader, self.stream.inside, self.stream.fork)

    def loss(self, batch: Rows, global_step: int) -> Tensor:
        """The loss of the next slice, generating completions first when the previous ones are used up.

        Args:
            batch: prompts of a generation batch, from `loader`.
            global_step: updates done so far.

        Returns:
            Scalar loss, already divided by the gradient accumulation, as TRL does.
        """
        if not self.policy.training:
            raise ValueError("The policy is in evaluation mode: TRL would neither buffer nor accumulate. Call train().")
        trainer = self._trainer
        trainer.state.global_step = global_step
        with self.stream.inside():
            inputs = trainer._prepare_inputs(batch)
            loss = trainer.compute_loss(self.policy, inputs)
        trainer._step += 1
        return loss

    def take_rollout(self) -> dict[str, Any]:
        """What the last `loss` generated on this process, empty if it used older completions.

        Returns:
            `completion_lengths` (long [B]) and `truncated` (bool [B]: cut off at the cap), `effort` and `environment`
            (B texts each), of the whole generation batch.
        """
        rollout, self._trainer.rollout = self._trainer.rollout, None
        return rollout or {}

    def metrics(self) -> dict[str, float]:
        """Means of TRL's metrics since the last call, over all processes; unknown (NaN) values are left out."""
        metrics = self._trainer._metrics["train"]
        known = {key: [value for value in values if not math.isnan(value)] for key, values in metrics.items()}
        metrics.clear()
        return {key: sum(values) / len(values) for key, values in known.items() if values}

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside weights, optimizer and loader: one entry per process, tensors and plain Python.

        Every process must call it; the list is the same on all.
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
        """Continues where the saved engine was.

        Raises:
            ValueError: it was saved by another number of processes: no process could continue its own randomness.
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
    """Keeps the global randomness as it was: TRL seeds all generators when it is built."""
    stream = RandomStream(device)
    with stream.fork():
        yield
