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
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed import all_gather_object, get_world_size, is_initialized
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_callable_name

from lit_puzzle.environments.environment import LEVELS
from lit_puzzle.generation.mismatch import mismatch_of, sums
from lit_puzzle.rl.effort_means import effort_means
from lit_puzzle.rl.loader import ResumableLoader
from lit_puzzle.rl.reward_checks import Faults, checked_reward
from lit_puzzle.rl.rewards import Correctness, RewardFunction
from lit_puzzle.rl.shared_rewards import complete
from lit_puzzle.rl.stop_settings import StopSettings
from lit_puzzle.rl.vllm_rollouts import VLLMRollouts
from lit_puzzle.run.stopped_training import TrainingStoppedError
from lit_puzzle.training.finite import ADVICE, raise_together
from lit_puzzle.training.random_state import RandomStream

Rows = list[dict[str, Any]]


class _Trainer(GRPOTrainer):
    """GRPOTrainer with a context around rollouts, a record of the last rollout, checked rewards, and no telemetry."""

    faults: Faults
    rollouts: VLLMRollouts | None = None
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

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.rollouts is not None:
            policy, sampled = output["old_per_token_logps"], output["sampling_per_token_logps"]
            own = sums(policy, sampled, output["completion_mask"])
            found = mismatch_of(self.accelerator.gather(own.float()).view(-1, len(own)))
            self._metrics["train"]["sampling/kl"].append(found.kl)
            self._metrics["train"]["sampling/sync_bytes"].append(float(self.rollouts.sent_bytes))
            if self.rollouts.replay is not None:
                known, tokens = self.rollouts.replay.replayed
                self._metrics["train"]["sampling/replayed"].append(known / max(tokens, 1))
            if self.rollouts.engine.settings.importance_sampling.mode == "none":
                output["importance_sampling_ratio"] = torch.ones_like(output["importance_sampling_ratio"])
            found.check(self.rollouts.bound, self.state.global_step + 1)
        return output

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
        own = [[len(ids), LEVELS.index(row["effort"])] for ids, row in zip(completion_ids, inputs, strict=True)]
        tokens_N, levels_N = self.accelerator.gather(torch.tensor(own, device=rewards.device)).T
        complete(self.functions, rewards, tokens_N.contiguous(), levels_N, self.num_generations)
        graded = [column for column, function in enumerate(self.functions) if isinstance(function, Correctness)]
        for name, mean in effort_means(tokens_N, levels_N, rewards[:, graded[0]] if graded else None).items():
            self._metrics["train"][name].append(mean)
        first = self.accelerator.process_index * len(own)
        columns = rewards[first : first + len(own)].T.tolist()
        self.rollout["rewards"] = dict(zip(self.reward_func_names, columns, strict=True))
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
        rollout_context: context around generation by the policy (`unsharded`).
        rollouts: vLLM, where it generates in the policy's place.

    Attributes:
        loader: loader of the prompts, which resumes.
        stop: limits beyond which the run stops.
    """

    def __init__(
        self,
        policy: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Dataset,
        rewards: Sequence[RewardFunction],
        config: GRPOConfig,
        rollout_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        rollouts: VLLMRollouts | None = None,
    ) -> None:
        tokenizer.padding_side = "left"
        self.policy, self.config, self.stop = policy, config, StopSettings()
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
        if rollouts is not None:  # TRL's own engine would start in this process, and cannot load packed weights
            rollouts.slices = self._slices
            self._trainer.rollouts = self._trainer.vllm_generation = rollouts
            self._trainer.use_vllm, self._trainer._last_loaded_step = True, -1
        self._trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
        self.loader = ResumableLoader(self._trainer.get_train_dataloader, self.stream.inside, self.stream.fork)

    def loss(self, batch: Rows, global_step: int, check: Callable[[Tensor], None] = lambda _: None) -> Tensor:
        """Return the loss of the next slice; generates completions first when the previous ones are used up.

        Args:
            batch: prompts of a generation batch, from `loader`.
            global_step: number of updates so far.
            check: raises a TrainingStoppedError if the loss is not to be trained on.

        Returns:
            Scalar loss, divided by the gradient accumulation, as in TRL.

        Raises:
            TrainingStoppedError: vLLM or a reward failed, or the loss, KL divergence or importance ratios are not to be
                trained on; the state is that before this batch.
            ValueError: a policy in evaluation mode.
        """
        if not self.policy.training:
            raise ValueError(
                "The policy is in evaluation mode, in which TRL neither buffers nor accumulates. Call train()."
            )
        trainer = self._trainer
        trainer.state.global_step = global_step
        before = self.stream.state, trainer.state.num_input_tokens_seen
        try:
            with self.stream.inside():
                inputs = trainer._prepare_inputs(batch)
                loss = trainer.compute_loss(self.policy, inputs)
            check(loss.detach())
            self.stop.check(trainer._metrics["train"], global_step + 1)
        except TrainingStoppedError:  # a checkpoint is saved next, of the state before this batch
            self.stream.state, trainer.state.num_input_tokens_seen = before
            self.loader.position -= 1
            raise
        trainer._step += 1
        return loss

    def _slices(self) -> int:
        """Return how many slices of generation batches were used so far."""
        return int(self._trainer._step)

    def take_rollout(self) -> dict[str, Any]:
        """Return once what the last `loss` generated on this process; empty if it used earlier completions.

        Returns:
            `completion_lengths` (long [B]) and `truncated` (bool [B]: reached the cap), `completion_ids` (B lists),
            `effort`, `environment`, `prompt` and `answer` (B texts each), `rewards` (by name, B numbers each, before
            weighting), of the whole generation batch.
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
            "routes": [] if trainer.rollouts is None else trainer.rollouts.state(),
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
        if self._trainer.rollouts is not None:
            self._trainer.rollouts.load_state(own["routes"])
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
