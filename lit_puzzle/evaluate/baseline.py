"""Another evaluation to compare with: its prompts must be those of this one, word for word.

A chat template may read the clock: this run takes the date of the baseline. Reads `inputs.json` of the baseline's run;
writes the date into that of this run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_puzzle.environments.environment import PromptAtEffort
from lit_puzzle.environments.episodes import Episode, problem_number
from lit_puzzle.model.identity import reads_clock
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import enclosing_run, recorded_inputs, run_date, take_date


def check_problems(episodes: Sequence[Episode], problems: Sequence[PromptAtEffort], baseline: Path) -> None:
    """Check that a baseline is of the problems of this run, before anything is generated.

    Args:
        episodes: those of the baseline.
        problems: problems of this run, at their efforts.
        baseline: where the episodes were read.

    Raises:
        ValueError: they are other problems, or in another order.
    """
    before = [(episode.environment, episode.effort, episode.problem) for episode in episodes]
    now = [(problem.environment, effort, problem_number(problem)) for problem, effort in problems]
    if before != now:
        raise ValueError(
            f"baseline {baseline}: its {len(before)} episodes and the {len(now)} problems of this run are not the same "
            "problems in the same order. Evaluate both with the same environments, efforts, prompts_per_effort and "
            "seed."
        )


def take_baseline(run_dir: Path, checkpoint: Identity, baseline: Path) -> None:
    """Take the date of a baseline and check that its prompts were rendered by the same chat template.

    Args:
        run_dir: folder of this run, before it claims its inputs.
        checkpoint: the checkpoint that this run evaluates.
        baseline: run folder of another evaluation, or a folder of episodes in a run.

    Raises:
        ValueError: the baseline's prompts had another chat template, or another date that the template reads.
    """
    run = enclosing_run(baseline)
    known = {} if run is None else recorded_inputs(run)
    templates = {
        identity.content.get("chat_template") for name, identity in known.items() if name in ("checkpoint", "child")
    }
    if templates and templates != {checkpoint.content.get("chat_template")}:
        raise ValueError(
            f"baseline {baseline} was evaluated with another chat template than that of {checkpoint.path}: the prompts "
            "differ. Give both folders the same template, and evaluate the baseline again."
        )
    own = run_date(run_dir) if run is None else take_date(run_dir, run)
    other = None if run is None else run_date(run)
    if own != other and reads_clock(Path(checkpoint.path)):
        raise ValueError(
            f"the chat template of {checkpoint.path} reads the date, which is {own} in {run_dir} and "
            f"{other or 'unknown'} in the baseline {baseline}: the prompts differ. Evaluate with --overwrite, or the "
            "baseline again."
        )
