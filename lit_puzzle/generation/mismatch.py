"""How far an engine's log-probabilities are from the policy's, on the tokens that the engine drew.

    delta = log p_policy(token) - log p_engine(token)
    mean  = mean |delta|,   largest = max |delta|,   kl = mean(exp(delta) - 1 - delta)

`kl` estimates KL(engine || policy) without bias, for the tokens are the engine's (k3 in Schulman, "Approximating KL
divergence", 2020). Two implementations of the same weights differ by rounding only; stale or damaged weights in the
engine show here. Reads and writes nothing. Shapes: B completions, T tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_puzzle.generation.engine import EngineFailedError


@dataclass(frozen=True)
class Mismatch:
    """The difference over a rollout.

    Attributes:
        mean: mean |delta|; 0 without tokens.
        largest: largest |delta|.
        kl: estimated KL(engine || policy), in nats a token.
        tokens: how many tokens were compared.
    """

    mean: float
    largest: float
    kl: float
    tokens: int

    def check(self, bound: float, update: int) -> None:
        """Check that engine and policy agree.

        Args:
            bound: largest allowed `mean`.
            update: number of the update, for the message.

        Raises:
            EngineFailedError: they do not, or a log-probability is not a number.
        """
        if self.mean <= bound:  # false for NaN
            return
        raise EngineFailedError(
            f"vLLM and the policy disagree in the rollout of update {update}: mean |log-probability difference| "
            f"{self.mean:.3g}, largest {self.largest:.3g}, KL {self.kl:.3g} over {self.tokens:,} tokens; "
            f"rollouts.max_mismatch allows {bound:.3g}. Check the folder with serve_check; if its rounding is this "
            "large, raise max_mismatch or give rollouts.dtype: float32; the same command resumes."
        )


def sums(policy_BT: Tensor, engine_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return [tokens, sum of |delta|, sum of exp(delta) - 1 - delta, largest |delta|] of this process, in float64.

    Args:
        policy_BT: log-probabilities of the policy.
        engine_BT: those of the engine.
        mask_BT: which tokens count.
    """
    chosen_BT = mask_BT.bool()
    delta_N = (policy_BT.double() - engine_BT.double())[chosen_BT]
    largest = delta_N.abs().max() if delta_N.numel() else delta_N.new_zeros(())
    number = delta_N.new_tensor(delta_N.numel())
    return torch.stack([number, delta_N.abs().sum(), (delta_N.exp() - 1 - delta_N).sum(), largest])


def mismatch_of(sums_N4: Tensor) -> Mismatch:
    """Return the difference over all processes, from the `sums` of each (a row)."""
    tokens, distance, divergence, _ = sums_N4.sum(0).tolist()
    largest = float(sums_N4[:, 3].max())
    if math.isnan(distance):
        return Mismatch(math.nan, math.nan, math.nan, int(tokens))
    return Mismatch(distance / max(tokens, 1), largest, divergence / max(tokens, 1), int(tokens))
