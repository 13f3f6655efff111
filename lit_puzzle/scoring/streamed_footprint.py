"""Disk and traffic of replace-1-block scores of a parent that is read from disk one layer at a time.

    to the end   (min(C, F) + 5) files of states, F those that `scoring.memory.disk_gib` has room for; candidates beyond
                 it take another pass, from their first layer on
    of a layer   2 files of states, one pass

C candidates. Pure functions; imports no torch. `lit_puzzle.scoring.streamed_scores` is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_puzzle.library.footprint import Candidates
from lit_puzzle.model.footprint import ModelSize
from lit_puzzle.model.streaming_footprint import pass_traffic, state_files
from lit_puzzle.run.footprint import GIB

OF_THE_PARENT = 5  # files of lit_puzzle.scoring.streamed_scores


@dataclass(frozen=True)
class StreamedScoring:
    """What streamed scores take.

    Attributes:
        disk: bytes of the files that exist at once, of all processes.
        traffic: bytes from and to disk, of all processes.
        refusal: what a run would refuse; empty if nothing.
    """

    disk: dict[str, float]
    traffic: dict[str, float]
    refusal: str = ""


def layer_scoring(size: ModelSize, width: int, own_tokens: float, processes: int, found: Candidates) -> StreamedScoring:
    """Return what scores of each layer alone take; every candidate reads the states that enter its layer."""
    tokens = own_tokens * processes
    layers = len(size.layers) + found.rows / 2
    traffic = pass_traffic(size, width, tokens, processes, 1, layers)
    return StreamedScoring(state_files(size, width, tokens), traffic)


def scoring_to_the_end(
    size: ModelSize, width: int, own_tokens: float, processes: int, found: Candidates, disk_gib: float
) -> StreamedScoring:
    """Return what scores to the end of the model take.

    Args:
        size: the parent.
        width: bytes of a number of the states.
        own_tokens: of one process.
        processes: each with files of its own.
        found: the candidates.
        disk_gib: `scoring.memory.disk_gib`, of one process.
    """
    total, tokens = len(size.layers), own_tokens * processes
    halves = zip(found.experts, found.windows, strict=True)
    begins = [layer for layer, (experts, windows) in enumerate(halves) for _ in (*experts, *windows)]
    one = own_tokens * size.hidden * width
    room = int(disk_gib * GIB // max(one, 1)) - OF_THE_PARENT
    at_once = max(room, 1)
    passes = sum(total - (begins[first] if first else 0) for first in range(0, len(begins), at_once)) / total
    layers = sum(total - begin for begin in begins) + total
    refusal = "" if room > 0 else (
        f"scoring.memory.disk_gib={disk_gib:g} has no room for the {(OF_THE_PARENT + 1) * one / GIB:,.1f} GiB of one "
        "candidate"
    )  # fmt: skip
    files = min(at_once, len(begins)) + OF_THE_PARENT
    traffic = pass_traffic(size, width, tokens, processes, passes, layers)
    return StreamedScoring(state_files(size, width, tokens, files), traffic, refusal)
