"""Finished rows of a scoring run: one small file per candidate, so that an interrupted run loses only one of them.

Reads and writes in a run folder: `candidates/layer=L,NAME.json` (every metric of every sample) and
`evaluations/EVALUATION/layer=L,NAME.json` (the score of every item; `parent.json` for the parent); in both
`could_tell`, the share of tokens or items that the candidate can change. Where it is 0 there are no values.
A file appears whole or not at all; numbers are read back bit for bit.

Disk: about 20 bytes x candidates x (samples x metrics + items). Source: this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_puzzle.library.library import Library, parts
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.spec import BlockSpec

Values = dict[str, list[float]]
COULD_TELL = "could_tell"
PARENT_FILE = "parent.json"


@dataclass(frozen=True)
class Entry:
    """One row of the table of scores.

    Attributes:
        layer: index of the layer.
        name: name of the candidate, or of a half of it.
        kind: `experts`, `window` or `pair`; ranks are among rows of the same kind.
        block: the block that replaces the layer while it is scored.
        candidate: name of the library's candidate whose trained tensors it uses; None if it is no candidate itself.
    """

    layer: int
    name: str
    kind: str
    block: BlockSpec
    candidate: str | None

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"layer={self.layer},{self.name}.json"


# An entry, the share of tokens that the parent routes to experts that it has not, and how its values are computed.
Scored = tuple[Entry, float, Callable[[], Values]]


def entries_of(library: Library, pairs: bool) -> list[Entry]:
    """List all rows that a library needs, layer by layer.

    Args:
        library: the candidates.
        pairs: score every candidate itself; else the two halves of all candidates apart.

    Raises:
        ValueError: halves are to be scored apart, but a combination has trained tensors of its own.
    """
    entries: dict[tuple[int, str], Entry] = {}
    for layer, (own, *others) in enumerate(library.layers):
        names = {candidate.name for candidate in others}
        for candidate in others:
            if pairs:
                entries[layer, candidate.name] = Entry(layer, candidate.name, "pair", candidate.block, candidate.name)
                continue
            if candidate.weights is not None and None not in parts(candidate):
                raise ValueError(
                    f"layer {layer}: {candidate.name!r} has trained tensors of its own, which the scores of its halves "
                    "do not include; score with --scoring.pairs=true"
                )
            experts, window = parts(candidate)
            halves = (
                (experts, "experts", BlockSpec(candidate.block.experts, own.block.window_tokens)),
                (window, "window", BlockSpec(own.block.experts, candidate.block.window_tokens)),
            )
            for name, kind, block in halves:
                if name is not None:
                    entries[layer, name] = Entry(layer, name, kind, block, name if name in names else None)
    return list(entries.values())


class ScoreFiles:
    """The files of one folder of finished candidates.

    Args:
        folder: `candidates`, or a folder in `evaluations`, of a run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Return whether the file of that name is there."""
        return (self.folder / name).is_file()

    def write(self, name: str, values: Values) -> None:
        """Write one file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / name, values, indent=None)

    def unfinished(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries that have no file yet.

        Raises:
            ValueError: a file that is there is damaged, see `read`.
        """
        self.read([entry.file_name for entry in entries if self.has(entry.file_name)])
        return [entry for entry in entries if not self.has(entry.file_name)]

    def read(self, names: Sequence[str]) -> list[Values]:
        """Read files that `write` wrote, of the same metrics and samples but for those without values.

        Raises:
            ValueError: one is damaged, or has other metrics or another number of samples than the first.
        """
        read: list[Values] = []
        for name in names:
            path, again = self.folder / name, "Remove it; the same command scores this candidate again."
            try:
                values = read_json(path)
            except ValueError as error:
                raise ValueError(f"{error}. {again}") from error
            if not values or not all(_are_numbers(numbers) for numbers in values.values()):
                raise ValueError(f"{path} is damaged: it must have a list of numbers for each metric. {again}")
            read.append(values)
        sizes = [_sizes(values) for values in read]
        measured = [(name, size) for name, size in zip(names, sizes, strict=True) if size]
        for name, size in measured:
            beside, first = measured[0]
            if size != first:
                raise ValueError(
                    f"{self.folder / name} has {size} values, {beside} beside it has {first}. Remove the one that is "
                    "damaged; the same command scores that candidate again."
                )
        return read


def _sizes(values: Values) -> dict[str, int]:
    return {metric: len(numbers) for metric, numbers in values.items() if metric != COULD_TELL}


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def check_finite(what: str, values: Values) -> None:
    """Check that all values are finite.

    Args:
        what: layer and candidate, for the message.
        values: metric -> value of each sample.

    Raises:
        ValueError: one is not; names the candidate, the metric and the sample.
    """
    for metric, numbers in values.items():
        broken = [index for index, number in enumerate(numbers) if not math.isfinite(number)]
        if broken:
            raise ValueError(
                f"{what}: {metric} of sample {broken[0]} is {numbers[broken[0]]}. Check the parent and the candidate's "
                "weights for NaN, or score with more precision."
            )
