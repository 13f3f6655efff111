"""The stage `average`: two recovered children become one, their weighted average.

Reads two checkpoint folders of the same architecture. Writes `run_dir/child`, a complete folder, whole or not at all,
and with a sweep `run_dir/sweep/<share>/episodes.parquet`, the completions of the average of each share.

Memory and disk: those of `lit_puzzle.child.averaging`; a sweep has one more average on disk at a time, and the memory
of an evaluation. Source: arXiv 2602.11937 (the released model averages its "high" and "balanced" recoveries; the shares
are not published, hence the sweep).
"""

from __future__ import annotations

from pathlib import Path

from lit_puzzle.child.averaging import Average, open_merged
from lit_puzzle.child.settings import Packed, Sweep, check_share
from lit_puzzle.child.sweep import check_sweep, print_sweep, sweep_results
from lit_puzzle.environments.problem_identity import names_of, problems_identity
from lit_puzzle.model.identity import checkpoint_identity, weights_identity
from lit_puzzle.model.layout import count_parameters
from lit_puzzle.model.writer import atomic_folder
from lit_puzzle.run.files import resolved
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import claim_inputs, record_output


def average(
    run_dir: Path,
    first: Path,
    second: Path,
    share: float = 0.5,
    mxfp4: Packed = "refuse",
    sweep: Sweep | None = None,
) -> dict[str, float]:
    """Average two checkpoints of the same architecture into `run_dir/child`.

    Args:
        run_dir: run folder of this stage; a child that is already in it is replaced.
        first: checkpoint folder, such as `child` of an RL recovery at high effort.
        second: checkpoint folder, such as `child` of an RL recovery at all efforts.
        share: of the first, from 0 to 1.
        mxfp4: what is done with MXFP4 experts that differ between the two; equal ones are kept as they are.
        sweep: averages of other shares that are measured, not kept.

    Returns:
        `share`, `parameters`, `copied_tensors` and `averaged_tensors`; with a sweep `<share>/accuracy/<effort>` and so
        on, see `lit_puzzle.child.sweep`.

    Raises:
        ValueError: the two have no average (`lit_puzzle.child.averaging`), or the sweep cannot be measured.
    """
    check_share("share", share)
    folders = [require_input(first, "first checkpoint"), require_input(second, "second checkpoint")]
    opened = [open_merged(folder) for folder in folders]
    made = Average(opened[0], opened[1], mxfp4)
    if resolved(run_dir / "child") in [resolved(folder) for folder in folders]:
        raise ValueError(f"{run_dir / 'child'} would be replaced by an average of itself; choose another run_dir.")
    inputs = {"first": checkpoint_identity(opened[0]), "second": checkpoint_identity(opened[1])}
    if sweep is not None:
        problems = check_sweep(sweep, opened[0].folder, run_dir)
        inputs["held_out"] = problems_identity(names_of(sweep.held_out.environments), problems)
    claim_inputs(run_dir, inputs)
    with atomic_folder(run_dir / "child", replace=True) as scratch:
        made.write(scratch, share)
    record_output(run_dir, "child", weights_identity(run_dir / "child"))
    results = {"share": share, "parameters": float(count_parameters(opened[0].config))} | made.counts()
    if sweep is not None:
        found = sweep_results(made, sweep, run_dir)
        print_sweep(found)
        results |= {f"{number:g}/{key}": value for number, part in found.items() for key, value in part.items()}
    return results
