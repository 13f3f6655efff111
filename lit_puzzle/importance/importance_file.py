"""The importance file: a score for every expert of every layer of one parent, and the experts that it keeps.

Writes and reads `importance.json` (fingerprint of the parent, method, tokens, experts per layer) and
`importance.safetensors` (one float64 tensor `layers.N` of that layer's length each). Layers may differ in length.

A higher score means a more important expert; of equal scores the lower index ranks first. Disk: 8 bytes per expert.

A score that was not measured is not a zero: it is NaN, and the optional key `not_measured` of `importance.json` lists
these experts, a list for each layer; a NaN that is not listed is refused. Such experts rank behind all others: they are
the first to go, because no token of the data was routed to them.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.strict_json import check_whole

META_FILE, SCORES_FILE = "importance.json", "importance.safetensors"


def scores_identity(folder: Path) -> Identity:
    """Return the identity of the importance files in a folder."""
    return file_identity(folder, [META_FILE, SCORES_FILE])


@dataclass(frozen=True)
class Importance:
    """Scores of one parent's experts.

    Attributes:
        fingerprint: `lit_puzzle.model.checkpoint.fingerprint` of the parent.
        method: name of the scoring rule.
        tokens: number of tokens that were scored.
        scores: float64 scores of each layer, one per expert of that layer; NaN where it was not measured.
        not_measured: for each layer the experts without a score, ascending; empty: all have one.
    """

    fingerprint: str
    method: str
    tokens: int
    scores: tuple[Tensor, ...]
    not_measured: tuple[tuple[int, ...], ...] = ()

    def save(self, folder: Path) -> None:
        """Write both files; the JSON file, whose presence says that they are complete, last."""
        tensors = {f"layers.{layer}": scores_E.double().contiguous() for layer, scores_E in enumerate(self.scores)}
        partial = folder / f"{SCORES_FILE}.partial"
        save_file(tensors, partial)
        partial.replace(folder / SCORES_FILE)
        meta = {key: value for key, value in asdict(self).items() if key not in ("scores", "not_measured")}
        meta["num_experts"] = [len(scores_E) for scores_E in self.scores]
        if any(self.not_measured):
            meta["not_measured"] = [list(experts) for experts in self.not_measured]
        write_json(folder / META_FILE, meta, indent=2)

    @classmethod
    def load(cls, folder: Path) -> "Importance":
        """Read what `save` wrote.

        Raises:
            ValueError: a file is missing or damaged, or the two do not belong together.
        """
        if not ((folder / META_FILE).is_file() and (folder / SCORES_FILE).is_file()):
            raise ValueError(
                f"{folder} lacks {META_FILE} or {SCORES_FILE}. Make them with: lightning run recipes/final_kl.yaml"
            )
        try:
            meta = read_json(folder / META_FILE)
            tensors = load_file(folder / SCORES_FILE)
            scores = tuple(tensors[f"layers.{layer}"] for layer in range(len(meta["num_experts"])))
            lengths = [len(scores_E) for scores_E in scores]
            if len(tensors) != len(scores) or lengths != meta["num_experts"]:
                raise ValueError(f"{META_FILE} names experts {meta['num_experts']}, {SCORES_FILE} holds {lengths}")
            check_whole(META_FILE, "tokens", meta["tokens"], 1)
            missing = tuple(tuple(experts) for experts in meta.get("not_measured", ()))
            return cls(meta["fingerprint"], meta["method"], meta["tokens"], scores, missing)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"The importance files in {folder} are damaged ({error}); run the recipe again."
            ) from error

    def check(self, fingerprint: str, experts: Sequence[int]) -> None:
        """Check that there is one valid score for each expert of this parent.

        Args:
            fingerprint: of the parent.
            experts: how many experts each of its layers has.

        Raises:
            ValueError: scores of another parent, of other numbers of experts, or that are not valid.
        """
        self.check_parent(fingerprint)
        shapes = [list(scores_E.shape) for scores_E in self.scores]
        if shapes != [[count] for count in experts]:
            raise ValueError(
                f"the importance scores have the shapes {shapes}; the parent's layers have {list(experts)} experts. "
                "Run the recipe that made the scores again."
            )
        self.check_values()

    def check_parent(self, fingerprint: str) -> None:
        """Check that the scores are of this parent.

        Raises:
            ValueError: the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"The importance scores are of parent {self.fingerprint}, not of {fingerprint}: expert indices would "
                "mean other experts. Run the recipe that made the scores on this parent."
            )

    def check_values(self) -> None:
        """Check that every score is a finite number of at least 0, and NaN where it is listed as not measured.

        Raises:
            ValueError: one is not; names the layer.
        """
        listed = self.not_measured or ((),) * len(self.scores)
        if len(listed) != len(self.scores):
            raise ValueError(f"not_measured lists {len(listed)} layers; the importance scores have {len(self.scores)}")
        for layer, (scores_E, missing) in enumerate(zip(self.scores, listed, strict=True)):
            unknown = tuple(scores_E.isnan().nonzero()[:, 0].tolist())
            if unknown == missing:
                scores_E = scores_E.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
            if unknown != missing or not bool((scores_E.isfinite() & (scores_E >= 0)).all()):
                raise ValueError(
                    f"the importance scores of layer {layer} are not all finite and at least 0: {scores_E.tolist()}; "
                    f"listed as not measured are the experts {list(missing)}"
                )

    def keep(self, counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the best `counts[layer]` experts of every layer, ascending, as a plan lists them.

        Raises:
            ValueError: there is not one count per layer, or a count below 1 or above the layer's experts.
        """
        if len(counts) != len(self.scores):
            raise ValueError(
                f"{len(counts)} expert counts were given for {len(self.scores)} layers; give one per layer."
            )
        return tuple(best_experts(scores_E, count) for scores_E, count in zip(self.scores, counts, strict=True))


def best_experts(scores_E: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the `count` highest scores, ascending; of equal scores the lower indices are kept.

    Scores that were not measured (NaN) are the lowest.

    Raises:
        ValueError: `count` is below 1 or above the number of experts.
    """
    if not 1 <= count <= len(scores_E):
        raise ValueError(f"{count} experts cannot be kept of {len(scores_E)}; give 1 to {len(scores_E)}.")
    ranking = torch.argsort(scores_E.nan_to_num(nan=-math.inf, posinf=math.inf), descending=True, stable=True)
    return tuple(sorted(ranking[:count].tolist()))
