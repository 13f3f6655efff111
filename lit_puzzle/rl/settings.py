"""Settings of reinforcement learning: typed, checked before anything slow.

Reads and writes: nothing. Source of the knobs: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783), DAPO
(arXiv 2503.14476); the recovery itself: arXiv 2602.11937.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GRPOSettings:
    """One GRPO update.

    A generation batch holds `prompts_per_device * steps_per_generation * processes` completions, in groups of
    `num_generations` of the same prompt; it is used `num_iterations` times, in `steps_per_generation` slices.

    Args:
        num_generations: completions per prompt (G).
        completions_per_device: completions in one slice on one process.
        max_completion_length: cap on generated tokens.
        temperature: of sampling, and of the log-probabilities in the loss.
        top_p: nucleus of sampling; 1.0 samples from all tokens.
        top_k: most probable tokens to sample from; 0 samples from all.
        loss_type: `grpo` averages over tokens of a completion first, `dr_grpo` divides by the cap, `dapo` and `bnpo` by
            the number of tokens of the batch.
        epsilon: the importance ratio is clipped at 1 - epsilon ...
        epsilon_high: ... and 1 + epsilon_high (default: epsilon).
        importance_sampling_level: one importance ratio per `token` or per `sequence`.
        scale_rewards: what advantages are divided by: standard deviation of the `group`, of the `batch`, or `none`.
        beta: weight of the KL divergence to the child before training (unbiased, arXiv 2512.02556); needs LoRA, whose
            adapter when off is the reference.
        num_iterations: passes over a generation batch.
        steps_per_generation: slices of a generation batch; default: the gradient accumulation, one update a batch.
        mask_truncated_completions: leaves completions that hit the cap out of the loss.
        gradient_checkpointing: recomputes activations in backward.
        unshard_rollouts: gathers a sharded model once per rollout (3x faster); False gathers layer by layer, for
            models that do not fit on one device.
    """

    num_generations: int = 8
    completions_per_device: int = 32
    max_completion_length: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    beta: float = 0.0
    num_iterations: int = 1
    steps_per_generation: int | None = None
    mask_truncated_completions: bool = False
    gradient_checkpointing: bool = False
    unshard_rollouts: bool = True

    def __post_init__(self) -> None:
        at_least = {"num_generations": 2, "completions_per_device": 1, "max_completion_length": 1, "num_iterations": 1}
        given = {name: getattr(self, name) for name in at_least}
        for name, lowest in at_least.items():
            if given[name] < lowest:
                raise ValueError(f"grpo.{name}={given[name]} was given; it must be at least {lowest}.")
        if self.steps_per_generation is not None and self.steps_per_generation < 1:
            raise ValueError(f"grpo.steps_per_generation={self.steps_per_generation} was given; at least 1 is needed.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"grpo.temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k} were given; "
                "temperature > 0, 0 < top_p <= 1 and top_k >= 0 are needed."
            )
        if self.epsilon <= 0 or (self.epsilon_high is not None and self.epsilon_high <= 0) or self.beta < 0:
            raise ValueError(
                f"grpo.epsilon={self.epsilon}, epsilon_high={self.epsilon_high}, beta={self.beta} were given; "
                "the clip ranges must be positive and beta not negative."
            )

    def check_batch(self, accumulate_grad_batches: int, processes: int, prompts: int) -> None:
        """Checks what depends on the run: whole groups, enough prompts, whole updates per epoch.

        Raises:
            ValueError: with the numbers that were given and the next one that works.
        """
        slices = self.steps_per_generation or accumulate_grad_batches
        completions = self.completions_per_device * slices * processes
        if completions % self.num_generations:
            raise ValueError(
                f"A generation batch of {self.completions_per_device} completions x {slices} slices x {processes} "
                f"processes = {completions} does not hold whole groups of num_generations={self.num_generations}. "
                f"Set grpo.completions_per_device to a multiple of {self.num_generations}."
            )
        needed = completions // self.num_generations
        if prompts < needed:
            raise ValueError(f"{prompts} training prompts were given; one generation batch needs {needed}.")
        batches = prompts // needed * slices * self.num_iterations
        if batches % accumulate_grad_batches:
            raise ValueError(
                f"An epoch of {batches} batches does not hold whole updates of trainer.accumulate_grad_batches="
                f"{accumulate_grad_batches}. Make grpo.steps_per_generation ({slices}) a multiple of it."
            )
