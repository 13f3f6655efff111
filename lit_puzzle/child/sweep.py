"""Measures averages of several shares on the same held-out problems: accuracy and tokens at each effort.

Reads both checkpoints of the average. Writes `run_dir/sweep/<share>/episodes.parquet`; a share whose episodes are there
is not measured again. An average is on disk only while it is measured; the shares 0 and 1 are measured as they are.
Source: arXiv 2602.11937, its table of generated tokens before RL, of both variants and of their average.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_puzzle.child.averaging import Average
from lit_puzzle.child.settings import Sweep
from lit_puzzle.data.prompts import check_lengths
from lit_puzzle.environments.answer_formats import fix_format
from lit_puzzle.environments.environment import PromptAtEffort
from lit_puzzle.environments.episodes import EPISODES_FILE, Episode
from lit_puzzle.evaluate.accuracy import read_episodes, solve_problems, summarize, write_episodes
from lit_puzzle.generation.load import load_engine
from lit_puzzle.model.chat import fix_date
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.model.writer import atomic_folder
from lit_puzzle.run.inputs import run_date

SHOWN = ("accuracy", "accuracy_se", "tokens", "finished", "looping", "no_final", "no_analysis")


def check_sweep(sweep: Sweep, folder: Path, run_dir: Path) -> list[PromptAtEffort]:
    """Return the problems of a sweep, checked before anything slow.

    Args:
        sweep: its settings.
        folder: a checkpoint folder with the tokenizer of the averages.
        run_dir: the run folder, whose date prompts have.

    Raises:
        ValueError: a prompt cannot be rendered, or leaves no room for a completion.
    """
    problems = sweep.held_out.problems()
    tokenizer = load_tokenizer(folder)
    fix_date(tokenizer, run_date(run_dir))
    fix_format(tokenizer, sweep.held_out.answer_format)
    check_lengths(tokenizer, problems, folder, sweep.sampling.max_new_tokens)
    return problems


def sweep_results(made: Average, sweep: Sweep, run_dir: Path) -> dict[float, dict[str, float]]:
    """Measure the average of every share.

    Args:
        made: the average.
        sweep: shares and problems.
        run_dir: the run folder.

    Returns:
        Share -> its numbers, by the keys of an evaluation (`SHOWN`), and `effort_length_ratio`: mean tokens at high
        effort divided by mean tokens at low effort.
    """
    results = {}
    for share in sorted(sweep.shares):
        folder = run_dir / "sweep" / f"{share:g}"
        if not (folder / EPISODES_FILE).is_file():
            episodes = _measure(made, share, sweep, run_dir)
            with atomic_folder(folder, replace=True) as scratch:
                write_episodes(scratch, episodes, sweep.held_out.texts)
        results[share] = shown_numbers(read_episodes(folder))
    return results


def shown_numbers(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return the numbers of a share, see `sweep_results`."""
    numbers = summarize(episodes)
    found = {key: value for key, value in numbers.items() if key.split("/")[0] in SHOWN and key.count("/") == 1}
    tokens = [numbers.get(f"tokens/{effort}") for effort in ("high", "low")]
    return found | ({"effort_length_ratio": tokens[0] / tokens[1]} if tokens[0] and tokens[1] else {})


def _measure(made: Average, share: float, sweep: Sweep, run_dir: Path) -> list[Episode]:
    ends = {0.0: made.second.folder, 1.0: made.first.folder}
    if share in ends:
        return _solve(ends[share], sweep, run_dir)
    folder = run_dir / "sweep" / "child"
    with atomic_folder(folder, replace=True) as scratch:
        made.write(scratch, share)
    episodes = _solve(folder, sweep, run_dir)
    shutil.rmtree(folder)
    return episodes


def _solve(folder: Path, sweep: Sweep, run_dir: Path) -> list[Episode]:
    tokenizer = load_tokenizer(folder)
    fix_date(tokenizer, run_date(run_dir))
    fix_format(tokenizer, sweep.held_out.answer_format)
    engine = load_engine(sweep.engine, folder)
    return solve_problems(engine, tokenizer, sweep.held_out.problems(), sweep.held_out.environments, sweep.sampling)


def print_sweep(results: Mapping[float, Mapping[str, float]]) -> None:
    """Print accuracy and tokens of every share, an effort a column."""
    efforts = list(dict.fromkeys(key.split("/")[1] for part in results.values() for key in part if "/" in key))
    table = Table("share", *efforts, "high / low", title="Share of the first: accuracy, tokens")
    for share, part in results.items():
        cells = [
            f"{part[f'accuracy/{effort}']:.3f} ± {part[f'accuracy_se/{effort}']:.3f}, {part[f'tokens/{effort}']:.1f}"
            for effort in efforts
        ]
        ratio = part.get("effort_length_ratio")
        table.add_row(f"{share:g}", *cells, "" if ratio is None else f"{ratio:.2f}")
    Console().print(table)
