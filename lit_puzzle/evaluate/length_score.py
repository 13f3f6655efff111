"""By what the best weights of a validation are chosen where length matters as well as accuracy.

    score = accuracy - max(0, max over efforts of n / (best_within * m) - 1)

n = mean generated tokens of the validation at an effort, m = the parent's. Imports no torch; reads and writes nothing.
"""

from collections.abc import Mapping

from lit_puzzle.generation.lengths import LengthStatistics


def length_score(
    values: Mapping[str, float], best_within: float | None, parent: Mapping[str, LengthStatistics]
) -> float:
    """Return the score of a validation.

    Args:
        values: `val/accuracy` and `val/tokens/<effort>`.
        best_within: multiple of the parent's mean tokens that costs nothing; None: the score is the accuracy.
        parent: the parent's lengths; efforts that it does not have are not limited.
    """
    if best_within is None:
        return values["val/accuracy"]
    limits = {f"val/tokens/{effort}": best_within * lengths.mean for effort, lengths in parent.items()}
    excess = [tokens / limits[key] - 1 for key, tokens in values.items() if key in limits]
    return values["val/accuracy"] - max([0.0, *excess])
