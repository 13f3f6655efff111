"""Which room's footprint belongs to which command or class of a recipe.

The door of all footprints: the only file that names those of every room. Imports no torch; reads what they read.
"""

from __future__ import annotations

from collections.abc import Callable

from lit_puzzle.child import footprint as child
from lit_puzzle.data import footprint as data
from lit_puzzle.distill import blocks_footprint, logits_footprint, on_policy_footprint
from lit_puzzle.distill import footprint as distill
from lit_puzzle.evaluate import footprint as evaluate
from lit_puzzle.evaluate import text_footprint
from lit_puzzle.importance import footprint as importance
from lit_puzzle.kv_cache import footprint as kv_cache
from lit_puzzle.library import footprint as library
from lit_puzzle.report import footprint as report
from lit_puzzle.rl import footprint as rl
from lit_puzzle.run.footprint import Assumed, Device, Footprint
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.scoring import footprint as scoring
from lit_puzzle.search import footprint as search
from lit_puzzle.serve import footprint as serve
from lit_puzzle.tiny import footprint as tiny

Formula = Callable[[Values, Device, Assumed], Footprint]
OF_MODELS: dict[str, Formula] = {  # commands of Lightning: by the class of their model
    "lit_puzzle.rl.module.RLRecovery": rl.footprint,
    "lit_puzzle.distill.global_kd.GlobalDistillation": distill.footprint,
    "lit_puzzle.distill.on_policy.OnPolicyDistillation": on_policy_footprint.footprint,
    "lit_puzzle.distill.blocks.BlockwiseDistillation": blocks_footprint.footprint,
    "lit_puzzle.importance.importance.ExpertImportance": importance.footprint,
    "lit_puzzle.kv_cache.calibrate.KVCalibration": kv_cache.footprint,
    "lit_puzzle.tiny.pretrain.TinyParent": tiny.footprint,
}
OF_STAGES: dict[str, Formula] = {
    "library": library.footprint,
    "final_kl": scoring.final_kl_footprint,
    "combine_importance": importance.combine_footprint,
    "score": scoring.footprint,
    "search": search.footprint,
    "assemble": child.footprint,
    "average": child.average_footprint,
    "generate": data.footprint,
    "precompute_logits": logits_footprint.footprint,
    "evaluate": evaluate.footprint,
    "text_distance": text_footprint.footprint,
    "throughput": serve.throughput_footprint,
    "frontier": report.footprint,
    "report": report.report_footprint,
    "export": serve.export_footprint,
    "serve_check": serve.check_footprint,
}


def formula_of(command: str, values: Values) -> Formula | None:
    """Return the footprint of a recipe's stage; None for code of the user, whose costs nobody knows."""
    if command in OF_STAGES:
        return OF_STAGES[command]
    return OF_MODELS.get(str(values.get("model.class_path")))
