"""Tokens and grades of a rollout by effort, over the completions of all processes; reads and writes nothing."""

from torch import Tensor

from lit_puzzle.environments.environment import LEVELS


def effort_means(tokens_N: Tensor, levels_N: Tensor, grades_N: Tensor | None) -> dict[str, float]:
    """Return `tokens/<effort>` and, with grades, `accuracy/<effort>`, of the efforts that are there.

    Args:
        tokens_N: generated tokens of each completion.
        levels_N: its effort, as an index of `LEVELS`.
        grades_N: its grade from 0 to 1.
    """
    means = {}
    for level in levels_N.unique().tolist():
        own_N = levels_N == level
        means[f"tokens/{LEVELS[level]}"] = tokens_N[own_N].double().mean().item()
        if grades_N is not None:
            means[f"accuracy/{LEVELS[level]}"] = grades_N[own_N].double().mean().item()
    return means
