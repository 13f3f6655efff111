"""`lightning show RUN`: run, lineage, results and sample answers of any run folder, as text.

Reads records and rows of run folders; writes nothing but the standard output. Needs no torch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lit_puzzle.report.lineage_tree import lineage_lines, made_lines
from lit_puzzle.report.run_summary import change_lines, head_lines, read_run, result_lines
from lit_puzzle.report.sample_answers import answer_lines
from lit_puzzle.report.terminal_text import print_lines

SAMPLES = 3


def show(words: Sequence[str]) -> None:
    """Print a run folder.

    Args:
        words: the command line after `show`: the run folder and options.

    Raises:
        ValueError: the command line is wrong, the folder is not a run folder, or a file in it is damaged.
    """
    given = _parser().parse_args(words)
    if given.samples < 0:
        raise ValueError(f"--samples={given.samples} was given; it must be at least 0.")
    try:
        lines = run_lines(given.run, given.samples, given.rows, given.full)
    except OSError as error:
        raise ValueError(f"{given.run} cannot be read: {error}") from error
    print_lines(lines)


def run_lines(run_dir: Path, samples: int = SAMPLES, rows: str | None = None, full: bool = False) -> list[str]:
    """Return the text about a run folder as lines.

    Args:
        run_dir: the run folder.
        samples: how many answers that are right, and how many that are not.
        rows: file of answers, or the folder that it is in, relative to the run folder; None: the latest.
        full: whether hashes and long texts are shown whole.

    Raises:
        ValueError: it is not a run folder, or a file in it is damaged.
    """
    run = read_run(run_dir)
    about = [*head_lines(run), *lineage_lines(run, full), *made_lines(run, full), *change_lines(run)]
    return [*about, *result_lines(run), *answer_lines(run_dir, rows, samples, full)]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError with the usage."""
        raise ValueError(f"lightning show: {message}. {' '.join(self.format_usage().split())}")


def _parser() -> _Parser:
    about = "Print run, lineage, results and sample answers of a run folder."
    parser = _Parser("lightning show", description=about, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="answers shown of each kind, right and not right (default: 3)"
    )
    parser.add_argument("--rows", help="which answers, if there are several files: before, after")
    parser.add_argument("--full", action="store_true", help="long texts and hashes whole")
    return parser
