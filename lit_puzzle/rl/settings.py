"""Settings of reinforcement learning, as recipes hold them: rollouts, loss, rewards. Imports no torch.

Reads and writes nothing. Source of the settings: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783), DAPO
(arXiv 2503.14476), GDPO (arXiv 2601.05242); the recovery itself: arXiv 2602.11937.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from lit_puzzle.environments.answer_formats import FormatChoice
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.rl.length_settings import BudgetSettings, EndingSettings, GroupLengthSettings, OverlongSettings
from lit_puzzle.rl.stop_settings import StopSettings

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo"]
RatioLevel = Literal["token", "sequence"]
RewardScale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True)
class RolloutSampling:
    """How completions are drawn; names as in `lit_puzzle.generation.sampling.Sampling`.

    Args:
        max_new_tokens: cap on the tokens of a completion.
        temperature: divides the logits, in sampling and in the log-probabilities of the loss.
        top_p: mass of the most likely tokens that are drawn from; 1.0: all tokens.
        top_k: number of most likely tokens that are drawn from; 0: all tokens.
        seed: seed of the order of prompts and of sampling.

    Raises:
        ValueError: numbers out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        temperature_is_right = 0 < self.temperature < math.inf
        if self.max_new_tokens < 1 or not temperature_is_right or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"grpo.sampling.max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, "
                f"top_p={self.top_p}, top_k={self.top_k} were given; max_new_tokens >= 1, temperature > 0 and finite, "
                "0 < top_p <= 1 and top_k >= 0 are needed."
            )


@dataclass(frozen=True)
class GRPOLossSettings:
    """The loss of an update.

    Args:
        loss_type: `grpo` averages over the tokens of a completion first, `dr_grpo` divides by `max_new_tokens`, `dapo`
            and `bnpo` by the number of tokens of the batch.
        epsilon: the importance ratio is clipped at 1 - epsilon ...
        epsilon_high: ... and 1 + epsilon_high (default: epsilon).
        importance_sampling_level: one importance ratio per `token` or per `sequence`.
        scale_rewards: divisor of the advantages: standard deviation of the `group`, of the `batch`, or `none`.
        beta: weight of the KL divergence to the child before training (unbiased, arXiv 2512.02556); needs LoRA, where
            the model with its adapter off is the reference.
        mask_truncated_completions: leaves completions that reach `max_new_tokens` out of the loss (overlong filter).
        aggregation: `sum_then_normalize` sums the weighted rewards and makes advantages of the sum; in
            `normalize_then_sum` (GDPO, arXiv 2601.05242) every reward is first centered and divided by its standard
            deviation in the group, so that a weight means the same whatever the spread, and the sum is normalized over
            the batch; `scale_rewards` has no part in that.

    Raises:
        ValueError: another value of a choice, or numbers out of range.
    """

    loss_type: LossType = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    importance_sampling_level: RatioLevel = "token"
    scale_rewards: RewardScale = "group"
    beta: float = 0.0
    mask_truncated_completions: bool = False
    aggregation: Aggregation = "sum_then_normalize"

    def __post_init__(self) -> None:
        choices = {
            "loss_type": (self.loss_type, get_args(LossType)),
            "importance_sampling_level": (self.importance_sampling_level, get_args(RatioLevel)),
            "scale_rewards": (self.scale_rewards, get_args(RewardScale)),
            "aggregation": (self.aggregation, get_args(Aggregation)),
        }
        for name, (given, allowed) in choices.items():
            if given not in allowed:
                raise ValueError(f"grpo.loss.{name} is {given!r}; allowed: {list(allowed)}.")
        ranges = [self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high]
        if not all(0 < clip < math.inf for clip in ranges) or not 0 <= self.beta < math.inf:
            raise ValueError(
                f"grpo.loss.epsilon={self.epsilon}, epsilon_high={self.epsilon_high}, beta={self.beta} were given; "
                "the clip ranges must be positive and beta not negative, all of them finite."
            )


@dataclass(frozen=True)
class GRPOSettings:
    """A GRPO update.

    A generation batch contains `completions_per_device * steps_per_generation * processes` completions in groups of
    `num_generations`; it is used `num_iterations` times, in `steps_per_generation` slices.

    Args:
        num_generations: completions per prompt, a group (G).
        completions_per_device: completions in one slice on one process.
        steps_per_generation: slices of a generation batch; default: the gradient accumulation, one update a batch.
        num_iterations: passes over a generation batch.
        unshard_rollouts: gathers a sharded model once per rollout (3 times faster); False gathers layer by layer, for
            models that do not fit on one device.
        sampling: how completions are drawn.
        loss: the loss of an update.
        rollouts: what generates the completions.
        stop: limits beyond which the run stops.

    Raises:
        ValueError: numbers out of range.
    """

    num_generations: int = 8
    completions_per_device: int = 32
    steps_per_generation: int | None = None
    num_iterations: int = 1
    unshard_rollouts: bool = True
    sampling: RolloutSampling = RolloutSampling()
    loss: GRPOLossSettings = GRPOLossSettings()
    rollouts: RolloutSettings = RolloutSettings()  # noqa: RUF009  (frozen)
    stop: StopSettings = StopSettings()  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.rollouts.engine != "transformers" and self.sampling.top_k:
            raise ValueError(
                f"grpo.sampling.top_k={self.sampling.top_k} was given; with rollouts by vLLM leave it 0, or use top_p."
            )
        slices = 1 if self.steps_per_generation is None else self.steps_per_generation
        if self.num_generations < 2 or min(self.completions_per_device, slices, self.num_iterations) < 1:
            raise ValueError(
                f"grpo.num_generations={self.num_generations}, completions_per_device={self.completions_per_device}, "
                f"steps_per_generation={self.steps_per_generation}, num_iterations={self.num_iterations} were given; "
                "num_generations is at least 2, the others at least 1."
            )

    def check_batch(self, accumulate_grad_batches: int, processes: int, prompts: int) -> None:
        """Check that a run has whole groups, enough prompts, and whole updates per epoch.

        Args:
            accumulate_grad_batches: slices of an update.
            processes: number of processes.
            prompts: number of training prompts.

        Raises:
            ValueError: numbers that do not fit together; the message names the next ones that do.
        """
        slices = self.steps_per_generation or accumulate_grad_batches
        completions = self.completions_per_device * slices * processes
        if completions % self.num_generations:
            raise ValueError(
                f"A generation batch of {self.completions_per_device} completions x {slices} slices x {processes} "
                f"processes = {completions} does not contain whole groups of num_generations={self.num_generations}. "
                f"Set grpo.completions_per_device to a multiple of {self.num_generations}."
            )
        needed = completions // self.num_generations
        if prompts < needed:
            raise ValueError(f"{prompts} training prompts were given; one generation batch needs {needed}.")
        batches = prompts // needed * slices * self.num_iterations
        if batches % accumulate_grad_batches:
            raise ValueError(
                f"An epoch of {batches} batches does not contain whole updates of trainer.accumulate_grad_batches="
                f"{accumulate_grad_batches}. Make grpo.steps_per_generation ({slices}) a multiple of it."
            )


@dataclass(frozen=True)
class RewardSettings:
    """Weights of the built-in rewards; a weight of 0 leaves a reward out.

    Args:
        correctness: weight of a right answer.
        finished: weight of a completion that ends after its final answer.
        length: weight of the length limit.
        length_start: multiple of the parent's mean length at which the length limit starts to cost.
        length_end: multiple at which it costs its full weight.
        answer_format: of the completions; `auto`: what the tokenizer says.
        budget: a limit for every effort of its own.
        group_length: shorter completions of a prompt get more than longer ones.
        overlong: a penalty before the cap on generated tokens.
        endings: penalties of loops and of answers without thinking.

    Raises:
        ValueError: negative weights, no positive one, or limits out of order.
    """

    correctness: float = 1.0
    finished: float = 0.0
    length: float = 0.0
    length_start: float = 1.0
    length_end: float = 2.0
    answer_format: FormatChoice = "auto"
    budget: BudgetSettings = BudgetSettings()  # noqa: RUF009  (frozen)
    group_length: GroupLengthSettings = GroupLengthSettings()  # noqa: RUF009
    overlong: OverlongSettings = OverlongSettings()  # noqa: RUF009
    endings: EndingSettings = EndingSettings()  # noqa: RUF009

    def __post_init__(self) -> None:
        weights = {"correctness": self.correctness, "finished": self.finished, "length": self.length}
        weights |= {"budget": self.budget.weight, "group_length": self.group_length.weight}
        weights |= {"overlong": self.overlong.weight, "looping": self.endings.looping}
        weights |= {"no_analysis": self.endings.no_analysis}
        if not all(0 <= weight < math.inf for weight in weights.values()) or max(weights.values()) == 0:
            raise ValueError(
                f"Reward weights {weights} were given; they are finite, none is negative and one must be positive."
            )
        if not 0 <= self.length_start < self.length_end < math.inf:
            raise ValueError(
                f"length_start {self.length_start} and length_end {self.length_end} were given; "
                "0 <= length_start < length_end is needed, in multiples of the parent's mean length."
            )
        if self.group_length.weight > 0 and self.group_length.right_only and self.correctness == 0:
            raise ValueError(
                f"rewards.group_length.weight={self.group_length.weight} was given with rewards.correctness=0, which "
                "leaves no right completions to compare. Set rewards.group_length.right_only=false."
            )


@dataclass(frozen=True)
class ExtraReward:
    """A reward function of your own and its weight.

    Args:
        function: reward function in TRL's form, as a dotted path or a callable object by `class_path`: it gets
            `completion_ids` and the columns of the prompts as keywords and returns a float for each completion.
        weight: factor of its values in the sum of rewards; negative for a penalty, 0 leaves the reward out.

    Raises:
        ValueError: a weight that is not finite.
    """

    function: RewardFunction
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"extra_rewards: weight {self.weight} was given; it must be finite.")
