"""Draws of tokens that depend on (seed, row, position) only, so that batching never changes what is drawn.

    u(seed, row, position) = (word >> 11) / 2^53,   word = 64-bit word number `position` of Philox keyed by (seed, row)
    token                  = smallest t with sum over i <= t of q_i > u * sum over all i of q_i
    q                      = softmax(logits / temperature), 0 outside the smallest set of most likely tokens with
                             mass >= top_p (of equally likely ones, those with smaller ids)

Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): word n is computed without
the words before it. numpy guarantees the words of its bit generators for all versions, unlike the streams of torch's
and numpy's distributions. Logits themselves may differ in the last bits between batch shapes; a draw changes with them
only where u lies that close to an edge between two tokens.

Memory of a draw: about 24 bytes for each of `CHUNK` logits, 60 with top_p < 1, whatever the batch.
Reads and writes nothing. Shapes: B rows, V vocabulary.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 2**23  # logits in one chunk of rows
WORDS = 4  # 64-bit words of one Philox block


def uniforms(seed: int, row: int, start: int, count: int) -> NDArray[np.float64]:
    """Return the random numbers of one row, in [0, 1), for positions start, ..., start + count - 1.

    Args:
        seed: of the run, from 0 to 2^64 - 1.
        row: number of the prompt, from 0 to 2^64 - 1.
        start: first position; 0 is the first generated token.
        count: how many positions.
    """
    generator = np.random.Philox(key=np.array([seed, row], dtype=np.uint64), counter=start // WORDS)
    skipped = start % WORDS
    words = generator.random_raw(skipped + count)[skipped:]
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def draw_tokens(logits_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor) -> Tensor:
    """Return one token of each row, an int64 tensor (B); never a token of probability 0.

    Args:
        logits_BV: of the next token.
        temperature: divides the logits; 0 takes the most likely token, and `uniform_B` is not read.
        top_p: mass of the most likely tokens that are drawn from.
        uniform_B: a float64 random number in [0, 1) for each row.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    rows = max(CHUNK // logits_BV.shape[1], 1)
    chunks = zip(logits_BV.split(rows), uniform_B.to(logits_BV.device).split(rows), strict=True)
    return torch.cat([_draw(logits, temperature, top_p, u) for logits, u in chunks])


def _draw(logits_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor) -> Tensor:
    below_BV = logits_BV.double() - logits_BV.amax(-1, keepdim=True)  # else a tiny temperature overflows
    probs_BV = (below_BV / temperature).softmax(-1)
    if top_p < 1:
        probs_BV = restrict_to_top_p(probs_BV, top_p)
    mass_BV = probs_BV.cumsum(-1)
    # The second condition matters where rounding makes the sum grow over a token of probability 0 (parallel sums).
    hit_BV = (mass_BV > uniform_B[:, None] * mass_BV[:, -1:]) & (probs_BV > 0)
    token_B = hit_BV.to(torch.uint8).argmax(-1)  # the first, of equals
    return torch.where(hit_BV.any(-1), token_B, probs_BV.argmax(-1))


def restrict_to_top_p(probs_BV: Tensor, top_p: float) -> Tensor:
    """Return the probabilities with 0 outside the smallest set of most likely tokens with mass >= top_p."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = pad(sorted_BV.cumsum(-1)[:, :-1], (1, 0))
    return torch.zeros_like(probs_BV).scatter_(-1, order_BV, sorted_BV * (before_BV < top_p))
