"""Rewards that compare the completions of all processes: shortness within a group, and budgets of mean tokens.

TRL calls a reward function with the completions of one process. What needs more than one completion is put in its place
when the rewards of all processes are together (`complete`); the functions themselves return what is known before.

GroupLength: among the completions of one prompt, shorter ones get more,

    w_i = 1 - (n_i - min n) / (max n - min n),    r_i = w_i - mean w

n_i = generated tokens of completion i; min, max and mean are over the completions that are compared: the right ones of
the group (of grade 1), or all of them. r_i sums to 0 over them, so the level of rewards does not move; it lies between
-1 and 1, and is 0 for completions that are not compared, and where fewer than two are or all are equally long.

Budget of the mean: the penalty p_i of a completion (`lit_puzzle.rl.length_rewards.Budget`) counts as far as the effort
as a whole is above its budget,

    r_i = p_i clip((mean n - b) / (e - b), 0, 1)

b = budget, e = the mean from which on penalties count in full, mean over the effort's completions in the generation
batch. Long completions then cost nothing while the effort keeps its budget, and hard problems may take what easy ones
leave.

Source: group relative length control of the Nemotron 3 Nano report (arXiv 2512.20848, section on RLHF), which adds r
with coefficient 0.5 to the reward, once of the thinking and once of the answer; here n counts both. Comparing right
completions only takes the place of the report's bonus for the shortest of the best answers: a verifier says which are
right. The budget of the mean is ours. Shapes: N completions, P prompts, G completions of a prompt, F rewards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_puzzle.environments.environment import LEVELS
from lit_puzzle.rl.length_rewards import Budget


@dataclass(frozen=True)
class GroupLength:
    """Generated tokens, of which r is made when all are together."""

    right_only: bool = True
    __name__ = "group_length"

    def __call__(self, *, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Return the tokens of each completion."""
        return [float(len(ids)) for ids in completion_ids]

    def within_groups(self, tokens_PG: Tensor, grades_PG: Tensor) -> Tensor:
        """Return r for tokens and grades (1: right) of whole groups."""
        compared_PG = grades_PG >= 1 if self.right_only else torch.ones_like(tokens_PG, dtype=torch.bool)
        return relative_shortness(tokens_PG, compared_PG)


def relative_shortness(tokens_PG: Tensor, compared_PG: Tensor) -> Tensor:
    """Return r, see the head of this file.

    Args:
        tokens_PG: generated tokens, float.
        compared_PG: which completions are compared.

    Returns:
        r, float of the same shape.
    """
    shortest_P1 = tokens_PG.masked_fill(~compared_PG, torch.inf).amin(1, keepdim=True)
    longest_P1 = tokens_PG.masked_fill(~compared_PG, -torch.inf).amax(1, keepdim=True)
    spread_P1 = longest_P1 - shortest_P1
    told_apart_PG = compared_PG & (spread_P1 > 0)  # -inf where nothing is compared
    shortness_PG = torch.where(told_apart_PG, (longest_P1 - tokens_PG) / spread_P1, 0.0)
    mean_P1 = shortness_PG.sum(1, keepdim=True) / told_apart_PG.sum(1, keepdim=True).clamp(min=1)
    return torch.where(told_apart_PG, shortness_PG - mean_P1, 0.0)


def counted_share(budget: Budget, tokens_N: Tensor, levels_N: Tensor) -> Tensor:
    """Return the share of its penalty that counts, of each completion.

    Args:
        budget: budgets, and the means from which on penalties count in full.
        tokens_N: generated tokens.
        levels_N: effort, as an index of `LEVELS`.

    Returns:
        Shares, float [N].
    """
    shares_N = torch.ones(len(tokens_N), device=tokens_N.device)
    for level in levels_N.unique().tolist():
        own_N, effort = levels_N == level, LEVELS[level]
        start, full = budget.start_tokens[effort], budget.full_mean_tokens[effort]
        shares_N[own_N] = ((tokens_N[own_N].double().mean() - start) / (full - start)).clamp(0, 1).float()
    return shares_N


def complete(
    functions: Sequence[Callable[..., Any]], rewards_NF: Tensor, tokens_N: Tensor, levels_N: Tensor, group: int
) -> None:
    """Put the rewards that compare completions in the place of what their functions returned.

    Args:
        functions: reward functions, in the order of the columns; the first one grades where right ones are compared.
        rewards_NF: their values, of all processes, groups one after the other; changed.
        tokens_N: generated tokens.
        levels_N: effort, as an index of `LEVELS`.
        group: completions of a prompt (G).
    """
    for column, function in enumerate(functions):
        if isinstance(function, GroupLength):
            tokens_PG, grades_PG = tokens_N.view(-1, group).to(rewards_NF), rewards_NF[:, 0].reshape(-1, group)
            rewards_NF[:, column] = function.within_groups(tokens_PG, grades_PG).flatten()
        if isinstance(function, Budget) and function.full_mean_tokens:
            rewards_NF[:, column] *= counted_share(function, tokens_N, levels_N)
