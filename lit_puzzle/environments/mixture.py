"""Mixes environments by weights: whose turn it is, so that every prefix of the sequence is as close as it can be.

Reads and writes nothing. Needs no torch.
"""

import math
from collections.abc import Mapping, Sequence


def mixture_weights(names: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    """Return the weight of each environment.

    Args:
        names: of the environments.
        weights: weight by name; every environment has one.

    Raises:
        ValueError: a name that is no environment's, one that is missing, or a weight that is not a positive number.
    """
    unknown, missing = sorted(set(weights) - set(names)), sorted(set(names) - set(weights))
    if unknown or missing:
        raise ValueError(
            f"weights names {sorted(weights)}, the environments are {sorted(names)}: "
            f"{f'{unknown} are none of them' if unknown else f'{missing} have no weight'}. Give each of them a weight."
        )
    wrong = [name for name in names if not 0 < weights[name] < math.inf]
    if wrong:
        raise ValueError(
            f"weights: {wrong[0]} has {weights[wrong[0]]}. Give a number above 0, or leave it out of both."
        )
    return [float(weights[name]) for name in names]


def turns(weights: Sequence[float], count: int) -> list[int]:
    """Return the number of the environment whose turn it is, for each of `count` problems.

    The next turn is that of the environment that is furthest behind its share, the first of several; with equal
    weights they take turns in their order.

    Args:
        weights: of the environments, positive.
        count: number of turns.
    """
    total, drawn, order = math.fsum(weights), [0] * len(weights), []
    for index in range(count):
        behind = [weight / total * (index + 1) - given for weight, given in zip(weights, drawn)]
        best = max(behind)
        turn = next(number for number, value in enumerate(behind) if value >= best - 1e-9)
        drawn[turn] += 1
        order.append(turn)
    return order
