"""Settings of on-policy distillation, as recipes hold them: how the child samples. Imports no torch.

Reads and writes nothing. Source: arXiv 2306.13649 (on-policy distillation, generalized JSD).
"""

from dataclasses import dataclass

from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import Sampling


@dataclass(frozen=True)
class OnPolicySettings:
    """Rollouts of the child, and which weights are the best.

    A rollout is `completions_per_device * steps_per_generation * processes` completions, each of its own prompt; it is
    trained on once, in `steps_per_generation` batches.

    Args:
        completions_per_device: completions in one batch on one process.
        steps_per_generation: batches of a rollout; default: the gradient accumulation, one update a rollout.
        unshard_rollouts: gathers a sharded child once per rollout; False gathers layer by layer, for children that do
            not fit on one device.
        sampling: how completions are drawn; its temperature has no part in the loss.
        rollouts: what generates the completions. `importance_sampling` has no effect: the loss is right for any tokens.
        top_k: compares the parent's k most likely tokens and all others together, in place of all tokens, so that the
            parent's head is not needed while the child trains; None: all tokens.
        best_within: multiple of the parent's mean tokens that the best weights keep at every effort (`val/score`);
            None: accuracy alone decides.

    Raises:
        ValueError: numbers out of range, or rollouts that this stage has no use for.
    """

    completions_per_device: int = 32
    steps_per_generation: int | None = None
    unshard_rollouts: bool = True
    sampling: Sampling = Sampling(max_new_tokens=128)  # noqa: RUF009  (frozen)
    rollouts: RolloutSettings = RolloutSettings()  # noqa: RUF009
    top_k: int | None = None
    best_within: float | None = 1.3

    def __post_init__(self) -> None:
        self.sampling.refuse_logprobs("On-policy distillation")
        numbers = {
            "completions_per_device": self.completions_per_device,
            "steps_per_generation": self.steps_per_generation,
            "top_k": self.top_k,
        }
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"on_policy.{name}={number} was given; at least 1 is needed.")
        if self.best_within is not None and not self.best_within > 0:
            raise ValueError(f"on_policy.best_within={self.best_within} was given; a number above 0 or null is needed.")
        if self.rollouts.replay_routes:
            raise ValueError(
                "on_policy.rollouts.replay_routes: true was given; distillation compares the child's own routes with "
                "the parent's. Leave it out."
            )

    def check_loss(self, loss: LossSettings, vocabulary: int) -> None:
        """Check that the loss has only what sampled completions allow.

        Args:
            loss: terms of the loss.
            vocabulary: number of tokens.

        Raises:
            ValueError: hidden states or the language-model loss, or a `top_k` that does not fit.
        """
        if loss.hidden > 0 or loss.lm > 0:
            raise ValueError(
                f"loss.hidden={loss.hidden}, lm={loss.lm} were given; on-policy distillation compares distributions of "
                "the completions' tokens only (the lm loss would raise whatever was sampled): set both to 0."
            )
        if self.top_k is not None:
            loss.check_top_k()
            if self.top_k >= vocabulary:
                raise ValueError(f"on_policy.top_k={self.top_k} was given; the vocabulary has {vocabulary}: use null.")

    def batches(self, accumulate_grad_batches: int) -> int:
        """Return the batches of a rollout."""
        return self.steps_per_generation or accumulate_grad_batches
