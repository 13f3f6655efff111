"""The stage `library`: from a parent and its expert importance to every block that its layers could become.

Reads the parent's folder and its importance folder; writes `library.json` (`lit_puzzle.library.library`). The
candidates of a layer are the parent's own block; the block with each number of experts, of which those with the highest
scores are kept; the block with each window that is narrower than the layer's own; and all combinations of both.

Other importance folders may be given beside the first one: of each number of experts, the set that each of them would
keep is one more candidate, `experts=N@ORIGIN`, where it is another set. The search takes the better by replace-1-block
scores.

Source: arXiv 2602.11937 section 2. Memory: headers and 8 bytes per expert. Disk: about 6 bytes per kept expert of every
candidate; no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lit_puzzle.importance.importance_file import META_FILE, Importance, best_experts, scores_identity
from lit_puzzle.library.library import ORIGIN, PARENT, Candidate, Library, candidate_name, parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import claim_inputs, record_output
from lit_puzzle.spec import BlockSpec

SMALLEST_WINDOW = 2  # what the model takes


def library(
    run_dir: Path,
    parent: Path,
    importance: Path,
    experts: list[int],
    windows: list[int],
    beside: dict[str, Path] | None = None,
) -> dict[str, float]:
    """Write the block library of `parent` into `run_dir`.

    Args:
        run_dir: run folder of this stage.
        parent: checkpoint folder of the parent.
        importance: folder of importance scores of this parent.
        experts: numbers of experts that a layer may keep; a number that a layer has anyway adds no candidate there.
        windows: sliding windows in tokens that an attention may get where its own is wider or it is full.
        beside: origin -> folder of another importance of this parent, whose sets of experts are candidates too.

    Returns:
        Layers, candidates, the most candidates of one layer, and the decimal logarithm of the number of children.

    Raises:
        ValueError: importance and parent do not belong together, or a number fits no layer.
    """
    source = Checkpoint(require_input(parent, "parent checkpoint", "config.json"))
    _check_numbers(experts, windows, max(count for count, _ in source.blocks))
    fingerprint, own_blocks = source.fingerprint(), parent_blocks(source.config)
    folders = {"": importance} | (beside or {})
    _check_origins(list(beside or {}))
    experts_of = [own.num_experts for own in own_blocks]
    scores = {origin: _load(folder, fingerprint, experts_of) for origin, folder in folders.items()}
    inputs = {f"beside.{origin}" if origin else "importance": scores_identity(folders[origin]) for origin in folders}
    claim_inputs(run_dir, {"parent": checkpoint_identity(source)} | inputs)
    layers = tuple(
        layer_candidates(own, {origin: one.scores[layer] for origin, one in scores.items()}, experts, windows)
        for layer, own in enumerate(own_blocks)
    )
    made = Library(fingerprint, max(own.num_experts for own in own_blocks), source.config, layers)
    made.save(run_dir)
    record_output(run_dir, "library", made.identity(run_dir))
    sizes = [len(candidates) for candidates in made.layers]
    return {
        "layers": float(len(sizes)),
        "candidates": float(sum(sizes)),
        "candidates_per_layer/max": float(max(sizes)),
        "log10_children": sum(math.log10(size) for size in sizes),
    }


def layer_candidates(
    own: BlockSpec, scores: Mapping[str, Tensor], experts: Sequence[int], windows: Sequence[int]
) -> tuple[Candidate, ...]:
    """Return all candidates of one layer: the parent's block first, then by falling window and number of experts.

    Args:
        own: the parent's block.
        scores: origin -> importance of its experts; the first origin is not named. Sets that an origin before has
            chosen too are left out.
        experts: numbers of experts; those that are not below the layer's own are left out.
        windows: windows in tokens; those that are not narrower than the layer's own are left out.
    """
    kept = {own.experts: ""}
    for count in sorted((count for count in experts if count < own.num_experts), reverse=True):
        for origin, scores_E in scores.items():
            kept.setdefault(best_experts(scores_E, count), origin)
    narrower = [window for window in sorted(windows, reverse=True) if window < (own.window_tokens or math.inf)]
    candidates = []
    for window in (own.window_tokens, *narrower):
        for chosen, origin in kept.items():
            block = BlockSpec(chosen, window)
            candidates.append(Candidate(candidate_name(own, block, origin), block))
    assert candidates[0].name == PARENT
    return tuple(candidates)


def _load(folder: Path, fingerprint: str, experts: Sequence[int]) -> Importance:
    scores = Importance.load(require_input(folder, "expert importance", META_FILE))
    scores.check(fingerprint, experts)
    unknown = [layer for layer, scores_E in enumerate(scores.scores) if scores_E.isnan().all()]
    if unknown:
        raise ValueError(f"{folder} has no score for any expert of layers {unknown}: score them on more data.")
    return scores


def _check_origins(origins: Sequence[str]) -> None:
    wrong = [origin for origin in origins if not ORIGIN.fullmatch(f"experts=1@{origin}")]
    if wrong:
        raise ValueError(f"beside: origins are lower-case letters, digits and _, such as reap; got {wrong}")


def _check_numbers(experts: Sequence[int], windows: Sequence[int], most_experts: int) -> None:
    for name, numbers, smallest in (("experts", experts, 1), ("windows", windows, SMALLEST_WINDOW)):
        if len(set(numbers)) != len(numbers) or any(number < smallest for number in numbers):
            raise ValueError(f"{name} must be different numbers of at least {smallest}, got {list(numbers)}")
    if not experts and not windows:
        raise ValueError(
            "neither experts nor windows are given, so that every layer has one candidate, the parent's; name some"
        )
    too_many = [count for count in experts if count > most_experts]
    if too_many:
        raise ValueError(f"experts {too_many} cannot be kept: no layer of the parent has more than {most_experts}")
