"""Rows of completions: one form for every graded completion, written by evaluation and training, read by reports.

A finished set of rows is a Parquet file; rows that a training adds as it goes are JSON lines. A row has
    environment, effort         which environment verified it, at which reasoning effort
    problem                     crc32 of the messages, by which paired comparisons find the same problem
    seed, row                   of the random numbers that drew the completion
    correct, reason             the grade from 0 to 1, and why (`Verdict`)
    analysis                    whether thinking stands before the answer; null if the format does not tell them apart
    looping                     whether it ends in a loop (`lit_puzzle.environments.looping`); null if not known
    prompt_tokens               length of the prompt; null in files of older versions
    generated_tokens, finish    length, and whether it ended by itself (`stop`) or at the cap (`length`)
    seconds                     from the call of the engine to the last token, waiting included; null if not measured
    rewards                     value of each reward by its name, before weighting; only of training
    prompt, completion, answer  texts, control tokens included, and the right answer; a file may leave all three out

Reads and writes files of such rows. Needs no torch. Disk: 30 bytes a row (JSON lines 250) and the texts.
"""

import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from lit_puzzle.environments.completion import REASONS
from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.episode_table import parquet_bytes
from lit_puzzle.environments.grading import CUT_OFF, Finish
from lit_puzzle.environments.row_files import read_rows as read_any
from lit_puzzle.environments.verdict import Verdict
from lit_puzzle.run.files import to_json, write_atomically
from lit_puzzle.run.strict_json import checked_keys

EPISODES_FILE = "episodes.parquet"  # of a run folder
TABLE = ".parquet"  # a name that ends so is of a Parquet file, every other one of JSON lines
SEEN = ("analysis", "looping")  # keys of a row that older files do not have
OLDER = (*SEEN, "prompt_tokens")
PARTS = ("verdict", "request", "texts")  # of an episode, flat in a row
WITHOUT_FINAL = (*REASONS.values(), CUT_OFF)


@dataclass(frozen=True)
class Texts:
    """Texts of a completion: its prompt, itself, and the right answer."""

    prompt: str
    completion: str
    answer: str


@dataclass(frozen=True)
class Request:
    """What is known of a request beside its completion.

    Attributes:
        prompt_tokens: of the prompt as the model read it; None: not known.
        seconds: until its last token, None: not measured; it takes no part in comparisons.
    """

    prompt_tokens: int | None = None
    seconds: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Episode:
    """One problem with its completion; see the head of this file.

    Attributes:
        environment: name of the environment.
        effort: low, medium or high.
        problem: crc32 of its messages.
        verdict: grade, reason, and what else was seen.
        generated_tokens: end token included.
        finish: `stop`, or `length` at the cap.
        seed: of the random numbers.
        row: number of the prompt for the random numbers.
        request: prompt tokens and seconds.
        texts: prompt, completion and right answer.
    """

    environment: str
    effort: str
    problem: int
    verdict: Verdict
    generated_tokens: int
    finish: Finish = "stop"
    seed: int = 0
    row: int = 0
    request: Request = Request()
    texts: Texts | None = None

    @property
    def correct(self) -> float:
        """The grade, from 0 to 1."""
        return self.verdict.correct

    @property
    def analysis(self) -> bool | None:
        """Whether thinking stands before the answer; None if that is not known."""
        return self.verdict.analysis

    @property
    def looping(self) -> bool | None:
        """Whether it ends in a loop; None if that is not known."""
        return self.verdict.looping

    @property
    def seconds(self) -> float | None:
        """Until the last token; None: not measured."""
        return self.request.seconds

    @property
    def finished(self) -> bool:
        """Whether the completion ended by itself."""
        return self.finish == "stop"

    def to_row(self) -> dict[str, Any]:
        """Return it as a flat mapping of keys to values."""
        row = asdict(self)
        verdict, request, texts = (row.pop(part) for part in PARTS)
        if verdict["rewards"] is None:
            del verdict["rewards"]
        return row | verdict | request | (texts or {})


def problem_number(problem: Problem) -> int:
    """Return the number of a problem in rows: crc32 of its messages."""
    return zlib.crc32(problem.text().encode())


def failures(episodes: Iterable[Episode]) -> int:
    """Return how many completions a grader failed on."""
    return sum(episode.verdict.failed for episode in episodes)


def shares_without(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return shares of completions: `no_final` answer, `tool_calls`, and `looping` and `no_analysis` where known."""
    reasons = [episode.verdict.reason for episode in episodes]
    shares = {"no_final": sum(reason in WITHOUT_FINAL for reason in reasons) / len(reasons)}
    shares["tool_calls"] = reasons.count(REASONS["tool_call"]) / len(reasons)
    loops = [episode.looping for episode in episodes if episode.looping is not None]
    shares |= {"looping": loops.count(True) / len(loops)} if loops else {}
    thinking = [episode.analysis for episode in episodes if episode.analysis is not None]
    return shares | ({"no_analysis": thinking.count(False) / len(thinking)} if thinking else {})


def write_rows(path: Path, episodes: Sequence[Episode], texts: bool = True) -> None:
    """Write a file of rows, atomically.

    Args:
        path: the file: Parquet if its name ends in .parquet, else JSON lines.
        episodes: its rows.
        texts: whether rows hold prompt, completion and answer.
    """
    write_atomically(path, parquet_bytes(_rows(episodes, texts)) if path.suffix == TABLE else _lines(episodes, texts))


def append_rows(path: Path, episodes: Sequence[Episode], texts: bool = True) -> None:
    """Add rows at the end of a file of JSON lines, which is made if it is not there.

    A line that a killed run has left half is cut off first.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        with path.open("ab+") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(size - 1, 0))
            if size and stream.read(1) != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write(_lines(episodes, texts).encode())
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def cut_rows(path: Path, below: int) -> None:
    """Keep the rows of a file of JSON lines whose number is below `below`, and no half line, if there is a file.

    Raises:
        ValueError: the file cannot be read, or a line is no row; the message names file and line.
    """
    if not path.exists():
        return
    append_rows(path, [])
    write_rows(path, [episode for episode in read_rows(path) if episode.row < below])


def _rows(episodes: Sequence[Episode], texts: bool) -> list[dict[str, Any]]:
    return [(episode if texts else replace(episode, texts=None)).to_row() for episode in episodes]


def _lines(episodes: Sequence[Episode], texts: bool) -> str:
    return "".join(to_json(row, indent=None) + "\n" for row in _rows(episodes, texts))


def read_rows(path: Path) -> list[Episode]:
    """Return the rows of a file, Parquet or JSON lines by its content.

    Raises:
        ValueError: it cannot be read, or a row is none; the message names the file, and line or row.
    """
    if not path.exists() and path.suffix == TABLE and path.with_suffix(".jsonl").exists():
        raise ValueError(f"{path} does not exist, only {path.stem}.jsonl of an older version: run the stage again.")
    return [_episode(row, place) for place, row in read_any(path)]


def _episode(value: Any, place: str) -> Episode:
    texts = list(Texts.__dataclass_fields__)
    own = [name for name in Episode.__dataclass_fields__ if name not in PARTS]
    needed = [*own, "correct", "reason", "seconds"]
    row: dict[str, Any] = dict.fromkeys(OLDER) | checked_keys(place, value, needed, [*texts, *OLDER, "rewards"])
    rewards = _mapping(row.get("rewards"))
    given = [name for name in texts if name in row] if any(row.get(name) is not None for name in texts) else []
    text_keys = ("environment", "effort", "reason", *given)
    wrong = [name for name in text_keys if not isinstance(row[name], str)]
    wrong += [name for name in ("problem", "generated_tokens", "seed", "row") if not _is_whole(row[name])]
    wrong += [] if row["prompt_tokens"] is None or _is_whole(row["prompt_tokens"]) else ["prompt_tokens"]
    wrong += [] if _is_number(row["correct"]) and 0 <= row["correct"] <= 1 else ["correct"]
    wrong += [] if row["seconds"] is None or _is_number(row["seconds"]) else ["seconds"]
    wrong += [] if row["finish"] in get_args(Finish) else ["finish"]
    wrong += [name for name in SEEN if row[name] not in (None, True, False)]
    is_table = rewards is None or (isinstance(rewards, dict) and all(map(_is_number, rewards.values())))
    wrong += [] if is_table else ["rewards"]
    if wrong or len(given) not in (0, len(texts)):
        what = f"{wrong[0]} is {str(row[wrong[0]])[:60]!r}" if wrong else f"of {texts} it has {given} only"
        raise ValueError(f"{place}: the row is damaged: {what}. Run the stage that wrote it again.")
    verdict = Verdict(float(row["correct"]), row["reason"], **{name: row[name] for name in SEEN}, rewards=rewards)
    return Episode(
        **{name: row[name] for name in own},
        verdict=verdict,
        request=Request(row["prompt_tokens"], row["seconds"]),
        texts=Texts(**{name: row[name] for name in texts}) if given else None,
    )


def _mapping(value: Any) -> Any:
    """Return the pairs that Parquet has for a mapping as a mapping."""
    pairs = isinstance(value, list) and all(isinstance(pair, tuple) for pair in value)
    return dict(value) if pairs else value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
