"""Sample answers of a run: completions with prompt, right answer and verdict, so that a wrong grader is noticed.

Reads files of rows (`lit_puzzle.environments.episodes`) in a run folder and in the folders in it; writes nothing. Needs
no torch. Memory: the rows of one file.

The choice is the same at every call. Those that are not right: reasons take turns, a failed grader first, and within a
reason rows are evenly spaced in the file, so that all efforts and environments have a chance. Those that are right:
evenly spaced.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lit_puzzle.environments.episodes import Episode, read_rows
from lit_puzzle.environments.verdict import FAILED, UNCLEAR
from lit_puzzle.report.run_summary import is_run
from lit_puzzle.report.terminal_text import indented

EPISODES = "episodes.*"
REASONS = (FAILED, UNCLEAR, "wrong", "partly right", "no final answer", "cut off")  # the most suspicious first


def row_files(run_dir: Path) -> list[Path]:
    """Return the files of rows of a run folder, the latest state of the model first."""
    folders = [
        path for path in run_dir.iterdir() if not path.name.startswith(".") and path.is_dir() and not is_run(path)
    ]
    found = [file for folder in (run_dir, *folders) for file in folder.glob(EPISODES)]
    return sorted(found, key=lambda file: (file.parent != run_dir, file.parent.name != "after", file))


def chosen_file(run_dir: Path, name: str | None) -> Path | None:
    """Return the file of rows to show: the first, or the one that is named.

    Args:
        run_dir: the run folder.
        name: a file, or the folder that it is in, relative to the run folder; None: the first file.

    Raises:
        ValueError: there is no such file.
    """
    files = row_files(run_dir)
    if name is None:
        return next(iter(files), None)
    chosen = [file for file in files if name.rstrip("/") in (_relative(file, run_dir), _relative(file.parent, run_dir))]
    if not chosen:
        have = ", ".join(_relative(file, run_dir) for file in files) or "none"
        raise ValueError(f"{run_dir} has no answers {name!r}; it has {have}.")
    return chosen[0]


def answer_lines(run_dir: Path, name: str | None, samples: int, full: bool) -> list[str]:
    """Return the verdicts of a file of rows, counted, and sample rows.

    Args:
        run_dir: the run folder.
        name: which file of rows, see `chosen_file`.
        samples: how many rows that are right, and how many that are not.
        full: whether long texts are shown whole.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    file = chosen_file(run_dir, name)
    if file is None:
        return ["", "answers: no graded answers in this folder"]
    named = _relative(file, run_dir)
    if samples == 0:
        return ["", f"answers: in {named}"]
    try:
        episodes = read_rows(file)
    except ValueError as error:
        raise ValueError(f"{error} With --samples=0 the run is shown without its answers.") from error
    counts = Counter(_kind(episode) for episode in episodes)
    said = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common()) or "none"
    lines = ["", f"answers in {named}: {len(episodes):,} rows: {said}"]
    others = [f"--rows={_relative(other, run_dir)}" for other in row_files(run_dir) if other != file]
    lines += [f"  other answers: {', '.join(others)}"] if others else []
    for episode in choose(episodes, samples):
        lines += ["", *_episode_lines(episode, full)]
    return lines


def choose(episodes: Sequence[Episode], count: int) -> list[Episode]:
    """Return rows that are not right and then rows that are, at most `count` of each; see the head of this file."""
    right = [episode for episode in episodes if episode.correct == 1]
    groups = {reason: [e for e in episodes if e.correct < 1 and _kind(e) == reason] for reason in _reasons(episodes)}
    quota = dict.fromkeys(groups, 0)
    for _ in range(min(count, len(episodes))):
        for reason, group in groups.items():
            if sum(quota.values()) < count and quota[reason] < len(group):
                quota[reason] += 1
    wrong = [episode for reason, group in groups.items() for episode in _spaced(group, quota[reason])]
    return wrong + _spaced(right, count)


def _reasons(episodes: Sequence[Episode]) -> list[str]:
    """Return the reasons of rows that are not right, the most suspicious first."""
    found = dict.fromkeys(_kind(episode) for episode in episodes if episode.correct < 1)
    return sorted(found, key=lambda kind: REASONS.index(kind) if kind in REASONS else 0)


def _spaced(episodes: Sequence[Episode], count: int) -> list[Episode]:
    """Return at most `count` rows at equal distances."""
    taken = min(count, len(episodes))
    return [episodes[(2 * index + 1) * len(episodes) // (2 * taken)] for index in range(taken)]


def _kind(episode: Episode) -> str:
    """Return the reason of a verdict without what the grader says further."""
    return episode.verdict.reason.partition(":")[0]


def _episode_lines(episode: Episode, full: bool) -> list[str]:
    seconds = "" if episode.seconds is None else f", {episode.seconds:.3g} s"
    verdict = f"{episode.verdict.reason} (grade {episode.correct:g})"
    ending = {"stop": "ended by itself", "length": "cut off at the cap"}[episode.finish]
    lines = [
        f"  {verdict}: {episode.environment}, {episode.effort} effort, row {episode.row}, problem {episode.problem}",
        f"    {'length':<11} {episode.generated_tokens} tokens, {ending}{seconds}",
    ]
    if episode.texts is None:
        return [*lines, "    its texts were not recorded"]
    texts = (("prompt", episode.texts.prompt), ("completion", episode.texts.completion), ("gold", episode.texts.answer))
    return [*lines, *(line for label, text in texts for line in indented(label, text, full))]


def _relative(path: Path, run_dir: Path) -> str:
    return path.relative_to(run_dir).as_posix()
