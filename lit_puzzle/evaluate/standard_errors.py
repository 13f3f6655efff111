"""Mean and standard error of values of prompts, several of which may be of the same prompt.

mean = sum over i of y_i / n
standard error = sqrt( G / (G - 1) * sum over prompts g of ( sum over i in g of (y_i - mean) )^2 ) / n
    y_i = value of completion i; n = completions; G = different prompts.

detectable difference = (z of 97.5 % + z of 80 %) * standard error of the paired difference; 3 / G where that is zero

Completions of one prompt are not independent: with 8 samples of each of 100 prompts there are 100 independent values,
not 800. With one completion a prompt this is s / sqrt(n), s the sample standard deviation (n - 1). Reads and writes
nothing. Source: E. Miller, "Adding error bars to evals", arXiv 2411.00640, section 2.2 (clustered standard errors).
"""

import math
from collections.abc import Hashable, Sequence

from lit_puzzle.environments.episodes import Episode


def mean_and_error(values: Sequence[float], prompts: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """Return the mean and its standard error.

    Args:
        values: one of each completion.
        prompts: which prompt each is of; None: each of another one.

    Raises:
        ValueError: fewer than two prompts (no standard error exists).
    """
    groups = range(len(values)) if prompts is None else prompts
    if len(set(groups)) < 2:
        raise ValueError(
            f"{len(values)} completions of {len(set(groups))} prompts at one effort: a standard error needs two "
            "prompts. Ask more prompts per effort."
        )
    mean = math.fsum(values) / len(values)
    deviations: dict[Hashable, list[float]] = {}
    for value, prompt in zip(values, groups, strict=True):
        deviations.setdefault(prompt, []).append(value - mean)
    squares = math.fsum(math.fsum(group) ** 2 for group in deviations.values())
    count = len(deviations)
    return mean, math.sqrt(count / (count - 1) * squares) / len(values)


def detectable(error: float, prompts: int) -> float:
    """Return the difference that a comparison shows with a probability of 80 %, tested at 5 % on both sides.

    Where both models did the same on every prompt, it is the largest share that so many prompts do not exclude at 95 %.

    Args:
        error: standard error of the paired difference.
        prompts: different prompts.
    """
    return (1.95996 + 0.84162) * error if error > 0 else 3 / prompts


def prompts_of(episodes: Sequence[Episode]) -> list[tuple[str, int, str]]:
    """Return which prompt each episode is a sample of: environment, problem and effort."""
    return [(episode.environment, episode.problem, episode.effort) for episode in episodes]
