"""The scores of a library: how much quality each candidate of each layer costs, in several metrics.

Reads and writes `scores.json`: {"parent_fingerprint", "samples", "tokens", "longest", "entries": [{"layer",
"candidate", "metrics": {name: {"mean", "standard_error"}}, "could_tell": {name: share}}], "parent": {name: mean}}. The
search also accepts a file of your own in this form; `samples`, `tokens`, `longest` and `standard_error` may be left out
and then are 0, and so may `could_tell` and `parent`. The smallest such file:

    {"parent_fingerprint": "5d1c...",
     "entries": [{"layer": 0, "candidate": "experts=8", "metrics": {"kl": {"mean": 0.1}}}]}

The fingerprint is `parent_fingerprint` of the library's `library.json`, or, of a checkpoint folder,
`lit_puzzle.model.checkpoint.fingerprint(folder)`. Names are those of the library's candidates, or of their halves.
Every metric is a quality loss: 0 for the parent itself, larger is worse. An evaluation adds one under its own name,
and, where it decodes answers, `<evaluation>/tokens/<effort>`, `/cut/<effort>` and `/looping/<effort>`: by how many
tokens the mean answer at an effort gets longer, and by how much the shares of answers that are cut off or loop grow;
these may be below 0. `parent` has the parent's own means, which they are changes of.
`could_tell` has the share of `tokens`, and of the items of each evaluation, that the candidate can change
(`lit_puzzle.scoring.evidence`). Where it is 0 the metrics are missing: they were not measured, and are not 0.

| metric | per sample, over its scored tokens |
|---|---|
| hidden_mse | mean squared difference of the hidden states that the head reads (after the last norm) |
| hidden_cosine | 1 - cosine of the same |
| kl | KL(parent, candidate) of the next-token distributions, in nats |
| js | Jensen-Shannon divergence of the same, in nats |
| lm_loss | increase of the cross-entropy of the next token, in nats |
| top1_disagreement | share of tokens whose most likely next token differs |
| layer_error | squared difference of the states that leave the replaced layer / their square (with `depth: layer`) |
| mean_rank | rank of hidden_mse (or layer_error) among all candidates of a kind / their number, over random samples |

Source: arXiv 2602.11937 (hidden_mse, ranks, accuracy drop for windows), arXiv 2411.19146 (KL, LM loss).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_puzzle.library.library import Candidate, Library, parts
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.run.strict_json import checked_keys

SCORES_FILE = "scores.json"
_KEYS, _COUNTS = {"parent_fingerprint", "entries"}, ("samples", "tokens", "longest")
_ENTRY_KEYS, _SHARES, _PARENT = {"layer", "candidate", "metrics"}, "could_tell", "parent"
# An increase of the cross-entropy, or of an evaluation's errors, can be below 0; these cannot, but for rounding.
NEVER_NEGATIVE = frozenset({"hidden_mse", "layer_error", "hidden_cosine", "kl", "js", "top1_disagreement", "mean_rank"})
ROUNDING = 1e-6


@dataclass(frozen=True)
class Measurement:
    """A mean over samples and its standard error (0 where it is not known)."""

    mean: float
    standard_error: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Return a plain JSON value."""
        return {"mean": self.mean, "standard_error": self.standard_error}


Metrics = dict[str, Measurement]


@dataclass(frozen=True)
class Scores:
    """Quality losses of one parent's candidates.

    Attributes:
        parent_fingerprint: `lit_puzzle.model.checkpoint.fingerprint` of the parent.
        samples: number of sequences that were scored; 0 where the file does not say.
        tokens: number of their scored tokens; 0 where the file does not say.
        entries: (layer, candidate name) -> metric -> quality loss. Halves that were scored apart have their own names,
            `experts=N` (or `experts=N@ORIGIN`) and `window=W`.
        could_tell: (layer, candidate name) -> `tokens`, or an evaluation -> share that could tell; empty where the file
            does not say.
        longest: tokens of the longest sequence that was scored; 0 where the file does not say.
        parent: name of a metric of an evaluation -> the parent's own mean; empty where the file does not say.
    """

    parent_fingerprint: str
    samples: int
    tokens: int
    entries: Mapping[tuple[int, str], Metrics]
    could_tell: Mapping[tuple[int, str], Mapping[str, float]] = field(default_factory=dict)
    longest: int = 0
    parent: Mapping[str, float] = field(default_factory=dict)

    def not_measured(self, layer: int, name: str, metric: str) -> str | None:
        """Return in words why a candidate has no score in a metric; None where the file does not say."""
        shares = self.could_tell.get((layer, name), {})
        source = metric if metric in shares else "tokens"
        if shares.get(source) != 0.0:
            return None
        what = "scored tokens" if source == "tokens" else f"items of {source!r}"
        return f"it was not measured: none of the {what} could tell"

    def check_parent(self, fingerprint: str) -> None:
        """Check that the scores are of this parent.

        Raises:
            ValueError: the fingerprints differ.
        """
        if fingerprint != self.parent_fingerprint:
            raise ValueError(
                f"The scores are of parent {self.parent_fingerprint}, not of {fingerprint}. "
                "Run recipes/score.yaml on this parent."
            )

    def check_library(self, library: Library) -> None:
        """Check that every score is of a candidate of the library; others would be ignored.

        Allowed in a layer are the names of its candidates and of their halves, `experts=N` and `window=W`.

        Raises:
            ValueError: the scores are of another parent, or one is of an unknown layer or candidate, which is named.
        """
        self.check_parent(library.parent_fingerprint)
        known = [_names(candidates) for candidates in library.layers]
        layers = sorted({layer for layer, _ in self.entries if layer >= len(known)})
        if layers:
            raise ValueError(f"the scores have entries of layers {layers}; the library's are 0 to {len(known) - 1}")
        unknown = [(layer, name) for layer, name in self.entries if name not in known[layer]]
        if unknown:
            layer, name = unknown[0]
            raise ValueError(
                f"the scores have {len(unknown)} entries of no candidate of the library: {unknown[:5]}; layer "
                f"{layer} allows {sorted(known[layer])}. Correct or remove {name!r}, or score this very library with "
                "recipes/score.yaml."
            )

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        entries = [
            {"layer": layer, "candidate": name, "metrics": {key: value.to_json() for key, value in metrics.items()}}
            | ({_SHARES: dict(self.could_tell[layer, name])} if (layer, name) in self.could_tell else {})
            for (layer, name), metrics in self.entries.items()
        ]
        counts = {"samples": self.samples, "tokens": self.tokens} | ({"longest": self.longest} if self.longest else {})
        own = {_PARENT: dict(self.parent)} if self.parent else {}
        return {"parent_fingerprint": self.parent_fingerprint, **counts, "entries": entries} | own

    @classmethod
    def from_json(cls, data: object) -> Scores:
        """Make scores from the value of `to_json`.

        Raises:
            ValueError: a key is unknown or missing, a value is of another type, or an entry occurs twice.
        """
        values = checked_keys("scores", data, _KEYS, (*_COUNTS, _PARENT))
        fingerprint, entries = values["parent_fingerprint"], values["entries"]
        if not isinstance(fingerprint, str) or not isinstance(entries, list):
            raise ValueError(f"parent_fingerprint must be a text and entries a list, got {fingerprint!r}")
        counts = {name: _count(name, values.get(name, 0)) for name in _COUNTS}
        read: dict[tuple[int, str], Metrics] = {}
        could_tell: dict[tuple[int, str], dict[str, float]] = {}
        for entry in entries:
            key, metrics, shares = _entry(entry)
            if key in read:
                raise ValueError(f"layer {key[0]}, candidate {key[1]!r} comes twice")
            read[key] = metrics
            if shares:
                could_tell[key] = shares
        own = values.get(_PARENT, {})
        if not isinstance(own, Mapping) or not all(type(mean) in (int, float) for mean in own.values()):
            raise ValueError(f"{_PARENT} must be an object of numbers, got {own!r}")
        return cls(fingerprint, entries=read, could_tell=could_tell, parent=dict(own), **counts)

    def save(self, folder: Path) -> None:
        """Write `scores.json`."""
        write_json(folder / SCORES_FILE, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read what `save` wrote.

        Args:
            folder: the folder, or the file itself.

        Raises:
            ValueError: the file is missing or damaged, or contains NaN.
        """
        file = folder if folder.is_file() else folder / SCORES_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {SCORES_FILE}. Make it with: lightning run recipes/score.yaml")
        content = read_json(file)
        try:
            return cls.from_json(content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def measure(values: list[float]) -> Measurement:
    """Compute the mean over samples and its standard error, s / sqrt(n) with the sample standard deviation s.

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(
            f"{len(values)} samples were scored; a standard error needs two. Give more sequences or items."
        )
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Measurement(mean, math.sqrt(variance / len(values)))


def _names(candidates: Sequence[Candidate]) -> set[str]:
    """Return the names that scores of a layer may have."""
    halves = {name for candidate in candidates for name in parts(candidate) if name is not None}
    return {candidate.name for candidate in candidates} | halves


def _entry(data: object) -> tuple[tuple[int, str], Metrics, dict[str, float]]:
    values = checked_keys("an entry", data, _ENTRY_KEYS, (_SHARES,))
    layer, name, metrics = _count("layer", values["layer"]), values["candidate"], values["metrics"]
    where = f"layer {layer}, candidate {name!r}"
    if not isinstance(name, str) or not isinstance(metrics, Mapping):
        raise ValueError(f"{where}: candidate must be a text and metrics an object")
    shares = values.get(_SHARES, {})
    if not isinstance(shares, Mapping) or not all(_is_share(share) for share in shares.values()):
        raise ValueError(f"{where}: {_SHARES} must be an object of shares from 0 to 1, got {shares!r}")
    read = {key: _measurement(f"{where}, {key}", key, value) for key, value in metrics.items()}
    return (layer, name), read, dict(shares)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _measurement(where: str, metric: str, data: object) -> Measurement:
    values = checked_keys(where, data, {"mean"}, {"standard_error"})
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values.values()):
        raise ValueError(f"{where}: mean and standard_error must be numbers, got {values}")
    if values.get("standard_error", 0.0) < 0:
        raise ValueError(f"{where}: standard_error must be at least 0, got {values['standard_error']}")
    if metric in NEVER_NEGATIVE and values["mean"] < -ROUNDING:
        raise ValueError(f"{where}: mean must be at least 0, as {metric} is, got {values['mean']}")
    return Measurement(float(values["mean"]), float(values.get("standard_error", 0.0)))


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
    return value
