"""The stage `library`: from a parent and its expert importance to every block that its layers could become.

Reads the parent's folder and its importance folder; writes `library.json` (`lit_puzzle.library.library`). In each
    layer: the parent's own block; each number of experts, the best-scored ones staying; each window that makes the
    layer see less than it does; and all combinations of both.

Source: arXiv 2602.11937 section 2. Memory: headers and 8 bytes an expert. Disk: about 6 bytes per kept expert of every
candidate: no weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lit_puzzle.importance.importance_file import Importance, best_experts
from lit_puzzle.library.library import PARENT, Candidate, Library, candidate_name, parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.run.folder import require_input
from lit_puzzle.spec import BlockSpec

SMALLEST_WINDOW = 2  # what the model takes


def library(run_dir: Path, parent: Path, importance: Path, experts: list[int], windows: list[int]) -> dict[str, float]:
    """Write the block library of `parent` into `run_dir`.

    Args:
        run_dir: Run folder of this stage.
        parent: Checkpoint folder, gpt_oss or gpt_oss_puzzle.
        importance: Folder of importance scores of this very parent.
        experts: Numbers of experts that a layer may keep; one that a layer has anyway adds nothing there.
        windows: Sliding windows in tokens that an attention may get where it is wider or full.

    Returns:
        Layers, candidates, the most candidates of one layer, and the decimal logarithm of the number of children.

    Raises:
        ValueError: When importance and parent do not belong together, or a number fits no layer.
    """
    source = Checkpoint(require_input(parent, "parent checkpoint"))
    _check_numbers(experts, windows, max(count for count, _ in source.blocks))
    scores = Importance.load(require_input(importance, "expert importance"))
    fingerprint = source.fingerprint()
    scores.check_parent(fingerprint)
    own_blocks = parent_blocks(source.config)
    layers = []
    for layer, (own, scores_E) in enumerate(zip(own_blocks, scores.scores, strict=True)):
        if not bool(scores_E.isfinite().all()):
            raise ValueError(f"the importance scores of layer {layer} are not all finite: {scores_E.tolist()}")
        layers.append(layer_candidates(own, scores_E, experts, windows))
    made = Library(fingerprint, max(own.num_experts for own in own_blocks), source.config, tuple(layers))
    made.save(run_dir)
    sizes = [len(candidates) for candidates in made.layers]
    return {
        "layers": float(len(sizes)),
        "candidates": float(sum(sizes)),
        "candidates_per_layer/max": float(max(sizes)),
        "log10_children": sum(math.log10(size) for size in sizes),
    }


def layer_candidates(
    own: BlockSpec, scores_E: Tensor, experts: Sequence[int], windows: Sequence[int]
) -> tuple[Candidate, ...]:
    """All candidates of one layer, the parent's own block first, then by falling number of experts and window.

    Args:
        own: The parent's block.
        scores_E: Importance of its experts.
        experts: Numbers of experts; those the layer has not more than are left out.
        windows: Windows in tokens; those that are not narrower than the layer's own are left out.
    """
    kept = [own.experts]
    kept += [best_experts(scores_E, count) for count in sorted(experts, reverse=True) if count < own.num_experts]
    narrower = [window for window in sorted(windows, reverse=True) if window < (own.window_tokens or math.inf)]
    blocks = [BlockSpec(chosen, window) for window in (own.window_tokens, *narrower) for chosen in kept]
    candidates = tuple(Candidate(candidate_name(own, block), block) for block in blocks)
    assert candidates[0].name == PARENT
    return candidates


def _check_numbers(experts: Sequence[int], windows: Sequence[int], most_experts: int) -> None:
    for name, numbers, smallest in (("experts", experts, 1), ("windows", windows, SMALLEST_WINDOW)):
        if len(set(numbers)) != len(numbers) or any(number < smallest for number in numbers):
            raise ValueError(f"{name} must be different numbers of at least {smallest}, got {list(numbers)}")
    if not experts and not windows:
        raise ValueError("neither experts nor windows are given: every layer could only stay what it is; name some")
    too_many = [count for count in experts if count > most_experts]
    if too_many:
        raise ValueError(f"experts {too_many} cannot be kept: no layer of the parent has more than {most_experts}")
