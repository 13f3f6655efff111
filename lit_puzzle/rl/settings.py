"""Settings of reinforcement learning: typed, checked before anything slow, one dataclass per idea.

Reads and writes: nothing. Source of the knobs: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783), DAPO
(arXiv 2503.14476), LoRA (arXiv 2106.09685); the recovery itself: arXiv 2602.11937.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


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


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of full fine-tuning.

    Args:
        rank: inner dimension.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapter's input.
        target_modules: names of the linear layers that get an adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.target_modules:
            raise ValueError(
                f"lora.rank={self.rank}, alpha={self.alpha}, target_modules={self.target_modules} were given; "
                "rank >= 1, alpha > 0 and at least one module name are needed."
            )

    def wrap(self, model: "PreTrainedModel") -> "PeftModel":
        """The model inside a LoRA wrapper: only the adapters are trainable."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


@dataclass(frozen=True)
class EvaluationSettings:
    """How the policy is measured on held-out prompts.

    Args:
        prompts_per_effort: prompts per effort before and after training, the same ones.
        max_new_tokens: cap on generated tokens; default: the cap of training.
        batch_size: prompts generated together on one process.
        seed: which held-out prompts; validation, which chooses the best weights, asks none of them.
    """

    prompts_per_effort: int = 256
    max_new_tokens: int | None = None
    batch_size: int = 128
    seed: int = 1

    def __post_init__(self) -> None:
        if self.prompts_per_effort < 2 or self.batch_size < 1 or (self.max_new_tokens or 1) < 1:
            raise ValueError(
                f"{self} was given; prompts_per_effort >= 2, batch_size >= 1 and max_new_tokens >= 1 are needed."
            )


def freeze_parameters(model: nn.Module, patterns: list[str]) -> None:
    """Freezes the parameters whose names match a pattern (`*` stands for anything).

    Raises:
        ValueError: a pattern that matches nothing, or nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"freeze: {pattern!r} matches no parameter; names look like {names[len(names) // 2]!r}.")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: {patterns} leaves nothing to train. Remove a pattern.")


def keep_master_weights(model: nn.Module) -> None:
    """Turns every parameter that trains into float32; with frozen bfloat16 beside it, precision must be mixed."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def optimise_trainable(
    module: nn.Module,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    lr_scheduler: Callable[[Optimizer], Any] | None,
) -> Any:
    """For `configure_optimizers`: an optimiser over the trainable parameters, and a schedule that counts updates."""
    built = optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    if lr_scheduler is None:
        return built
    return {"optimizer": built, "lr_scheduler": {"scheduler": lr_scheduler(built), "interval": "step"}}
