"""Where a plan stands at the edge of what was measured: a proof says nothing about what no score could tell.

    windows     few scored tokens, or items of an evaluation, could tell what they cost
    contexts    the scenario's are longer than any sequence that was scored
    extremes    most layers take the smallest block that was offered: better ones may lie beyond

Reads and writes nothing. `lit_puzzle.search.search` prints the sentences and puts them into plan.json and search.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_puzzle.library.library import Library, parts
from lit_puzzle.scoring.scores import Scores
from lit_puzzle.spec import BlockSpec, Target

FEW = 0.05  # a share of tokens or items below this is named
MOST = 0.5  # a share of layers above this is named


def edges(scores: Scores, library: Library, plan: Mapping[str, Any], targets: Sequence[Target]) -> list[str]:
    """Return in sentences what the scores of a plan could not tell; empty where there is nothing to say.

    Args:
        scores: the scores that the plan was chosen by.
        library: the library.
        plan: the plan, as a JSON value.
        targets: what it was chosen for.
    """
    blocks = [BlockSpec.from_json(block) for block in plan["blocks"]]
    return [*_few(scores, library, blocks), *_longer(scores, targets), *_extremes(library, blocks)]


def _few(scores: Scores, library: Library, blocks: Sequence[BlockSpec]) -> list[str]:
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for layer, (row, block) in enumerate(zip(library.layers, blocks, strict=True)):
        chosen = next(c for c in row if c.block == block)
        for name in (chosen.name, *parts(chosen)):
            for source, share in scores.could_tell.get((layer, name or ""), {}).items():
                if share < FEW:
                    found.setdefault((name or "", source), []).append((layer, share))
    sentences = []
    for (name, source), of in found.items():
        layers, least = sorted({layer for layer, _ in of}), min(share for _, share in of)
        what = "scored tokens" if source == "tokens" else f"items of {source}"
        sentences.append(
            f"{name} was chosen in layers {layers}, but only {least:.1%} of the {what} could tell its cost"
        )
    return sentences


def _longer(scores: Scores, targets: Sequence[Target]) -> list[str]:
    longest = max(target.scenario.total_tokens for target in targets)
    if not scores.longest or longest <= scores.longest:
        return []
    return [
        f"requests of {longest} tokens are planned for, but the longest sequence that was scored has {scores.longest}: "
        "what the plan loses beyond was not measured"
    ]


def _extremes(library: Library, blocks: Sequence[BlockSpec]) -> list[str]:
    free = [(row, block) for row, block in zip(library.layers, blocks, strict=True) if len(row) > 1]
    least = sum(
        block.num_experts == min(c.block.num_experts for c in row) < row[0].block.num_experts for row, block in free
    )
    if not free or least <= MOST * len(free):
        return []
    return [
        f"{least} of {len(free)} layers keep the fewest experts that the library offers: the best plan may have fewer, "
        "which were not scored"
    ]
