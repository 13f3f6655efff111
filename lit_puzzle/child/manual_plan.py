"""A plan without a search: a number of experts for each layer and windows by hand.

Reads the folder of expert importance where experts are pruned; writes nothing. Memory: 8 bytes per expert.
Source: arXiv 2602.11937 section 2 (the experts with the highest importance are kept).
"""

from __future__ import annotations

from lit_puzzle.child.settings import ManualPlan
from lit_puzzle.importance.importance_file import META_FILE, Importance
from lit_puzzle.library.library import parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.run.folder import require_input
from lit_puzzle.spec import BlockSpec, Plan


def manual_plan(parent: Checkpoint, manual: ManualPlan) -> Plan:
    """Make a plan from numbers.

    Args:
        parent: the parent.
        manual: how many experts each layer keeps, and which layers get another window.

    Raises:
        ValueError: the scores are of another parent or not finite, or a number fits no layer.
    """
    unknown = sorted(set(manual.windows) - set(range(parent.num_layers)))
    if unknown:
        raise ValueError(f"windows names layers {unknown}; the parent has layers 0..{parent.num_layers - 1}")
    own = parent_blocks(parent.config)
    kept = tuple(block.experts for block in own)
    fingerprint = parent.fingerprint()
    if manual.experts is not None and manual.importance is not None:
        scores = Importance.load(require_input(manual.importance, "expert importance", META_FILE))
        scores.check(fingerprint, [block.num_experts for block in own])
        counts = [manual.experts] * parent.num_layers if isinstance(manual.experts, int) else manual.experts
        kept = scores.keep(counts)
    blocks = [
        BlockSpec(experts, manual.windows.get(layer, block.window_tokens))
        for layer, (experts, block) in enumerate(zip(kept, own, strict=True))
    ]
    return Plan(fingerprint, max(block.num_experts for block in own), tuple(blocks))
