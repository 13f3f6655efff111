"""The stage `combine_importance`: several importance scores of one parent made into one, layer by layer.

Reads importance folders (`lit_puzzle.importance.importance_file`) and the parent's headers; writes `importance.json`
and `importance.safetensors`, which `library` reads as any other importance. Pure functions on tensors and rules as
small dataclasses; no weights are read.

Geometric mean of M scores with weights w, per layer:   s_i = exp( sum_m w_m log s_mi / sum_m w_m )

Only the order of a layer's experts counts, which no factor of a score changes: scores in other units need no scaling.
An expert is important where all scores say so: a 0 in one of them is a 0. An expert that one of them did not measure
has no combined score.

Source: this project's own (docs/results.md, "Which experts to keep"). Memory and disk: 8 bytes per expert and score.
Shapes: M scores, E experts of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lit_puzzle.importance.importance_file import META_FILE, Importance, scores_identity
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.run.files import resolved
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import claim_inputs, record_output


class Combination(Protocol):
    """A rule that makes one score out of several.

    Attributes:
        name: name of the rule in importance.json.
    """

    name: ClassVar[str]

    def combine(self, scores_ME: Tensor) -> Tensor:
        """Combine the scores of one layer's experts.

        Args:
            scores_ME: float64, finite and at least 0, by folder; NaN where an expert was not measured.

        Returns:
            Shape (E,), float64, finite and at least 0; NaN where there is no score. Higher is more important.
        """
        ...


@dataclass(frozen=True)
class GeometricMean:
    """Geometric mean of the scores.

    Args:
        weights: one for each score, 1e-9 to 1e9; None: all alike.

    Raises:
        ValueError: a weight is not 1e-9 to 1e9.
    """

    weights: tuple[float, ...] | None = None
    name: ClassVar[str] = "geometric_mean"

    def __post_init__(self) -> None:
        if self.weights is not None and not all(1e-9 <= weight <= 1e9 for weight in self.weights):
            raise ValueError(f"GeometricMean: weights must be 1e-9 to 1e9, got {list(self.weights)}")

    def combine(self, scores_ME: Tensor) -> Tensor:
        """Return the weighted geometric mean; 0 where one score is 0.

        Raises:
            ValueError: there is not one weight per score.
        """
        weights = (1.0,) * len(scores_ME) if self.weights is None else self.weights
        if len(weights) != len(scores_ME):
            raise ValueError(f"GeometricMean: {len(weights)} weights were given for {len(scores_ME)} importance scores")
        weights_M1 = torch.tensor(weights, dtype=torch.float64)[:, None]
        return ((weights_M1 * scores_ME.log()).sum(dim=0) / weights_M1.sum()).exp()


def combine_importance(
    run_dir: Path,
    parent: Path,
    importances: list[Path],
    method: Combination | None = None,
) -> dict[str, float]:
    """Combine importance scores of `parent` into one, in `run_dir`.

    Args:
        run_dir: run folder of this stage.
        parent: checkpoint folder of the parent.
        importances: two or more folders of importance scores of this parent.
        method: the rule: `GeometricMean` of `lit_puzzle.importance.combine` (the default), or your own class with its
            interface.

    Returns:
        Scores, experts, and experts without a combined score.

    Raises:
        ValueError: fewer than two folders, scores of another parent or that are not finite, or a rule that returns
            something else than a score for each expert.
    """
    if len({resolved(folder) for folder in importances}) < max(2, len(importances)):
        raise ValueError(
            f"importances must name two or more different folders, got {[str(folder) for folder in importances]}"
        )
    rule: Combination = GeometricMean() if method is None else method
    source = Checkpoint(require_input(parent, "parent checkpoint", "config.json"))
    fingerprint = source.fingerprint()
    experts = [count for count, _ in source.blocks]
    loaded = [_load(folder, fingerprint, experts) for folder in importances]
    identities = {f"importances.{place}": scores_identity(folder) for place, folder in enumerate(importances)}
    claim_inputs(run_dir, {"parent": checkpoint_identity(source)} | identities)
    scores = tuple(rule.combine(torch.stack(of_layer)) for of_layer in zip(*(one.scores for one in loaded)))
    missing = tuple(tuple(scores_E.isnan().nonzero()[:, 0].tolist()) for scores_E in scores)
    unknown = [
        set().union(*(one.not_measured[layer] for one in loaded if one.not_measured)) for layer in range(len(scores))
    ]
    _check(rule.name, scores, experts, missing, unknown)
    name = f"{rule.name}({', '.join(one.method for one in loaded)})"
    made = Importance(fingerprint, name, min(one.tokens for one in loaded), scores, missing if any(missing) else ())
    made.check_values()
    made.save(run_dir)
    record_output(run_dir, "importance", scores_identity(run_dir))
    return {
        "scores": float(len(loaded)),
        "experts": float(sum(map(len, scores))),
        "experts_not_measured": float(sum(map(len, missing))),
    }


def _load(folder: Path, fingerprint: str, experts: Sequence[int]) -> Importance:
    importance = Importance.load(require_input(folder, "expert importance", META_FILE))
    try:
        importance.check(fingerprint, experts)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return importance


def _check(
    rule: str,
    scores: Sequence[Tensor],
    lengths: Sequence[int],
    missing: Sequence[Sequence[int]],
    unknown: Sequence[set[int]],
) -> None:
    """Check what a rule returned: a score per expert, NaN only where a score was missing."""
    for layer, (scores_E, length) in enumerate(zip(scores, lengths, strict=True)):
        if scores_E.shape != (length,) or scores_E.dtype != torch.float64:
            raise ValueError(
                f"{rule} returned {scores_E.dtype} of shape {tuple(scores_E.shape)} for layer {layer}; {length} "
                "float64 numbers are needed, one per expert"
            )
        if not set(missing[layer]) <= unknown[layer]:
            raise ValueError(
                f"{rule} returned NaN for experts of layer {layer} that all scores know: {scores_E.tolist()}"
            )
