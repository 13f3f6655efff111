"""Quality loss of a replaced block, from final hidden states and next-token distributions: pure functions on tensors.

For one token with hidden states h (parent) and g (candidate), after the last norm as the head reads them, the
log-probabilities a = log p and b = log q that the head computes from them, and d = b - a:

    hidden_mse          mean over channels of (h - g)^2
    hidden_cosine       1 - h.g / (|h| |g|)
    kl                  sum over v of q - p - p d   = KL(p || q): sum(q - p) is 0, up to rounding, which it cancels
    js                  1/2 sum over v of p (ln 2 - s(d)) + q (ln 2 - s(-d)),   s(x) = ln(1 + e^x)
                                                           = [KL(p || m) + KL(q || m)] / 2 with m = (p + q) / 2
    lm_loss             a_t - b_t for the true next token t; a token without a next one has none
    top1_disagreement   1 if argmax a != argmax b, else 0

All are computed in float32 (float64 for float64 models) and summed per sample in float64. Reads and writes nothing.
Source: arXiv 2602.11937 (MSE of the states before the head), arXiv 2411.19146 (KL, LM loss).

Memory besides the arguments, for chunks of n tokens, vocabulary V, b = 4 (8 in float64): at most 7 b n V bytes,
independent of the number of tokens.

Shapes: N tokens (of a chunk, or all), n of a chunk, L whose log-probabilities are kept, D hidden, V vocabulary,
S samples, M metrics.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)

METRICS = ("hidden_mse", "hidden_cosine", "kl", "js", "lm_loss", "top1_disagreement")
NO_TOKEN = -1  # target of a token that has no next one


@dataclass(frozen=True)
class ScoredTokens:
    """N scored tokens and the parent's results on them.

    Attributes:
        samples_N: index of each token's sample.
        targets_N: the token that follows in the sample, or NO_TOKEN.
        final_ND: the parent's hidden states after the last norm, as the head reads them.
        log_probs_LV: the parent's log-probabilities, in any memory; None to have them computed from `final_ND`.
        rows_N: the row of `log_probs_LV` of each token; None where it has a row for every token, in their order.
    """

    samples_N: Tensor
    targets_N: Tensor
    final_ND: Tensor
    log_probs_LV: Tensor | None = None
    rows_N: Tensor | None = None

    def only(self, kept_N: Tensor) -> "ScoredTokens":
        """Return those of the tokens that are marked in `kept_N`; the parent's log-probabilities are not copied."""
        rows_N = (kept_N.nonzero()[:, 0] if self.rows_N is None else self.rows_N[kept_N]).cpu()
        return ScoredTokens(
            self.samples_N[kept_N], self.targets_N[kept_N], self.final_ND[kept_N], self.log_probs_LV, rows_N
        )

    def parent_log_probabilities(self, chunk: slice, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the parent's log-probabilities of some of the tokens, (n, V), on the device of their states."""
        if self.log_probs_LV is None:
            return log_probabilities(self.final_ND[chunk], head)
        rows = chunk if self.rows_N is None else self.rows_N[chunk]
        return self.log_probs_LV[rows].to(self.final_ND.device)


def quality_loss_sums(
    tokens: ScoredTokens, child_ND: Tensor, head: Callable[[Tensor], Tensor], num_samples: int, chunk_tokens: int
) -> Tensor:
    """Sum each metric over the tokens of each sample.

    Args:
        tokens: the scored tokens and the parent's results on them.
        child_ND: the final hidden states with the candidate in place.
        head: hidden states (N, D) -> logits (N, V).
        num_samples: number S of samples.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        Shape (S, M), float64, columns in the order of `METRICS`.
    """
    sums_SM = torch.zeros(num_samples, len(METRICS), dtype=torch.float64, device=child_ND.device)
    for start in range(0, len(child_ND), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        states = tokens.final_ND[chunk], child_ND[chunk]
        parent_NV = tokens.parent_log_probabilities(chunk, head)
        child_NV = log_probabilities(states[1], head)
        columns = [*hidden_quality_loss(*states), *logit_quality_loss(parent_NV, child_NV, tokens.targets_N[chunk])]
        sums_SM.index_add_(0, tokens.samples_N[chunk], torch.stack([column.double() for column in columns], dim=1))
    return sums_SM


def token_counts(samples_N: Tensor, targets_N: Tensor, num_samples: int) -> Tensor:
    """Count the tokens by which each sum of `quality_loss_sums` is to be divided, shape (S, M), float64."""
    counts_SM = torch.zeros(num_samples, len(METRICS), dtype=torch.float64, device=samples_N.device)
    ones_NM = torch.ones(len(samples_N), len(METRICS), dtype=torch.float64, device=samples_N.device)
    ones_NM[:, METRICS.index("lm_loss")] = (targets_N != NO_TOKEN).double()
    return counts_SM.index_add_(0, samples_N, ones_NM)


def log_probabilities(hidden_ND: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute the log-softmax of the head's logits, (N, V), in float32 or better."""
    logits_NV = head(hidden_ND)
    return torch.log_softmax(logits_NV, dim=-1, dtype=exact(logits_NV.dtype))


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which quality losses are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hidden_quality_loss(parent_ND: Tensor, child_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean squared difference and 1 - cosine of each token, (N) each."""
    parent_ND, child_ND = parent_ND.to(exact(parent_ND.dtype)), child_ND.to(exact(child_ND.dtype))
    difference_ND = child_ND - parent_ND
    squares_N = difference_ND.square().sum(dim=-1)
    # 1 - cos = (|h - g|^2 - (|h| - |g|)^2) / (2 |h| |g|): no cancellation when the two are close
    parent_N, child_N = torch.linalg.vector_norm(parent_ND, dim=-1), torch.linalg.vector_norm(child_ND, dim=-1)
    lengths_N = (parent_N * child_N).clamp(min=torch.finfo(parent_N.dtype).tiny)
    cosine_N = (squares_N - (parent_N - child_N).square()) / (2 * lengths_N)
    return squares_N / parent_ND.shape[-1], cosine_N.clamp(min=0)


def logit_quality_loss(parent_NV: Tensor, child_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute KL, Jensen-Shannon divergence, loss increase and top-1 disagreement of each token, (N) each.

    Args:
        parent_NV: log-probabilities of the parent.
        child_NV: log-probabilities with the candidate in place.
        targets_N: the next token, or NO_TOKEN, where the increase is 0.
    """
    disagree_N = parent_NV.argmax(dim=-1) != child_NV.argmax(dim=-1)
    known_N = targets_N != NO_TOKEN
    places_N1 = targets_N.clamp(min=0)[:, None]
    increase_N = (parent_NV.gather(1, places_N1) - child_NV.gather(1, places_N1))[:, 0]
    increase_N = torch.where(known_N, increase_N, 0.0)
    change_NV = child_NV - parent_NV
    p_NV, q_NV = parent_NV.exp(), child_NV.exp()
    kl_N = (q_NV - p_NV).sub_(p_NV * change_NV).sum(dim=-1)
    gain_NV = math.log(2) - F.softplus(change_NV)  # log p/m; log q/m is that + d
    js_N = (p_NV.mul_(gain_NV)).add_(gain_NV.add_(change_NV).mul_(q_NV)).sum(dim=-1) / 2
    return kl_N.clamp(min=0), js_N.clamp(min=0), increase_N, disagree_N
