"""The stage `assemble`: a plan and a parent checkpoint become a child checkpoint.

Reads the parent's folder and a plan (`plan.json` of recipes/search.yaml, or a manual plan); and, where it is named, a
library, whose trained tensors take the place of the parent's in the layers whose block the plan took from it.
Writes `run_dir/child`: what `lit_puzzle.child.child` lists. The folder appears whole or not at all, and is made anew
every time.

Memory, disk and traffic: those of `lit_puzzle.child.child`. Source: arXiv 2602.11937.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lit_puzzle.child.child import Child
from lit_puzzle.child.folder import PLAN_FILE
from lit_puzzle.child.manual_plan import manual_plan
from lit_puzzle.child.settings import ManualPlan
from lit_puzzle.importance.importance_file import META_FILE, scores_identity
from lit_puzzle.library.library import LIBRARY_FILE, Library
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.identity import checkpoint_identity, weights_identity
from lit_puzzle.model.layout import count_parameters, kv_values
from lit_puzzle.model.writer import atomic_folder
from lit_puzzle.run.files import resolved
from lit_puzzle.run.folder import require_file, require_input
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.inputs import claim_inputs, record_output
from lit_puzzle.run.lineage import check_made_with
from lit_puzzle.spec import Plan, read_plan

CONTEXT_TOKENS = 131072  # at which the KV caches of parent and child are compared


def assemble(
    run_dir: Path,
    parent: Path,
    plan: Path | None = None,
    library: Path | None = None,
    manual: ManualPlan = ManualPlan(),  # noqa: B008  (frozen)
    rope_factor: float | None = None,
) -> dict[str, float]:
    """Make a child of `parent` in `run_dir/child`.

    Args:
        run_dir: run folder of this stage; a child that is already in it is replaced.
        parent: checkpoint folder of the parent, a stock model or itself a child.
        plan: a plan.json. Without it, `manual` makes the plan.
        library: folder of the library that the plan was searched in, for the tensors of its trained blocks.
        manual: numbers that make a plan without a search.
        rope_factor: new YaRN factor; max_position_embeddings becomes the original length times it. The paper raises 32
            to 56 to steady retrieval over 128K tokens, for which fewer full-attention layers are left.

    Returns:
        Parameters, experts, full-attention layers, weight bytes and KV values at 128K tokens of parent and child, and
        the ratios.

    Raises:
        ValueError: plan, importance, library and parent do not belong together, or the settings contradict each other.
    """
    source = Checkpoint(require_input(parent, "parent checkpoint", "config.json"))
    if plan is not None and manual != ManualPlan():
        raise ValueError("plan and manual exclude each other; give one of them")
    chosen = _searched(plan, library) if plan is not None else manual_plan(source, manual)
    folder = None if library is None else require_input(library, "block library", LIBRARY_FILE)
    child = Child(source, chosen, rope_factor, folder)
    if resolved(run_dir / "child") == resolved(source.folder):
        raise ValueError(f"{source.folder} would be replaced by its own child; choose another run_dir")
    inputs = _inputs(source, plan, folder, manual)
    if plan is not None and folder is not None:
        check_made_with(plan, "library", inputs["library"], "Name the library that the plan was searched in.")
    claim_inputs(run_dir, inputs)
    with atomic_folder(run_dir / "child", replace=True) as scratch:
        child.write(scratch)
    made = Checkpoint(run_dir / "child")
    warn_of_larger_weights(source, made)
    record_output(run_dir, "child", weights_identity(made))
    return summarize(source, made)


def warn_of_larger_weights(parent: Checkpoint, child: Checkpoint) -> None:
    """Say where fewer experts are left than the parent chooses for a token: their weights still sum to 1.

    Nothing takes the place of a chosen expert that is gone, so what the others write grows; with a router of zeros,
    which weighs all alike, by chosen / left.
    """
    chosen = int(parent.config[parent.family.config.experts_per_token])
    left = [experts for experts, _ in child.blocks if experts < chosen]
    if left:
        Console().print(
            f"{len(left)} of {len(child.blocks)} layers keep fewer experts than a token chooses ({chosen}): "
            f"the weights of those that are left grow, on average {chosen / min(left):.2g} times where {min(left)} are "
            "left."
        )


def _inputs(parent: Checkpoint, plan: Path | None, library: Path | None, manual: ManualPlan) -> dict[str, Identity]:
    found = {"parent": checkpoint_identity(parent)}
    if plan is not None:
        found["plan"] = file_identity(require_file(plan, "plan", PLAN_FILE))
    if library is not None:
        found["library"] = Library.load(library).identity(library)
    if manual.importance is not None:
        found["importance"] = scores_identity(require_input(manual.importance, "expert importance", META_FILE))
    return found


def _searched(path: Path, library: Path | None) -> Plan:
    """Read a plan.json and refuse to drop the trained blocks that it was searched with."""
    plan, record = read_plan(require_file(path, "plan", PLAN_FILE))
    if library is None and record.get("trained_files"):
        raise ValueError(
            f"{path} was searched among trained blocks ({len(record['trained_files'])} files of {record['library']}); "
            f"without them the child is another one. Add --library={record['library']}"
        )
    return plan


def summarize(parent: Checkpoint, child: Checkpoint) -> dict[str, float]:
    """Return the headline numbers of a child and its parent."""
    results: dict[str, float] = {}
    for name, checkpoint in (("parent", parent), ("child", child)):
        results[f"parameters/{name}"] = count_parameters(checkpoint.config)
        results[f"experts/{name}"] = sum(count for count, _ in checkpoint.blocks)
        results[f"full_attention_layers/{name}"] = sum(window is None for _, window in checkpoint.blocks)
        results[f"weight_bytes/{name}"] = sum(info.num_bytes for info in checkpoint.tensors.values())
        results[f"kv_values_128k/{name}"] = kv_values(checkpoint.config, CONTEXT_TOKENS)
    for quantity in ("parameters", "weight_bytes", "kv_values_128k"):
        results[f"{quantity}/ratio"] = results[f"{quantity}/child"] / results[f"{quantity}/parent"]
    return results
