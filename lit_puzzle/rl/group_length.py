"""Length control within a group: among the completions of one prompt, shorter ones get more.

    w_i = 1 - (n_i - min n) / (max n - min n),    r_i = w_i - mean w

n_i = generated tokens of completion i; min, max and mean are over the completions that are compared: the right ones of
the group (of grade 1), or all of them. r_i sums to 0 over them, so the level of rewards does not move; it lies between
-1 and 1, and is 0 for completions that are not compared, and where fewer than two are or all are equally long.

TRL calls a reward with the completions of one process, and a group may lie on several. So `GroupLength` returns
lengths, and the engine puts r in their place when the rewards of all processes are together.

Source: group relative length control of the Nemotron 3 Nano report (arXiv 2512.20848, section on RLHF), which adds r
with coefficient 0.5 to the reward, once of the thinking and once of the answer; here n counts both. Comparing right
completions only takes the place of the report's bonus for the shortest of the best answers: a verifier says which are
right. Shapes: P prompts, G completions of a prompt.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupLength:
    """Generated tokens, of which the engine makes r (`within_groups`)."""

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
