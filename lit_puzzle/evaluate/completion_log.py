"""Completions of a block that is not finished, written as they end: a killed evaluation asks for the missing ones only.

Reads and writes a file of JSON lines, {"row", "token_ids", "finish", "seconds"}: `row` is the number of the problem. A
line that a kill left half does not count. Each row counts once. Disk: about 6 bytes a generated token, until the block
is finished.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from lit_puzzle.environments.grading import Finish
from lit_puzzle.generation.engine import Completion, Engine
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.run.files import to_json, write_atomically
from lit_puzzle.run.json_lines import read_json_lines
from lit_puzzle.run.strict_json import checked_keys

KEYS = ("row", "token_ids", "finish", "seconds")


def generate_missing(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int], log: Path
) -> list[Completion]:
    """Return one completion for each prompt: those of the log, and new ones, which are added to it as they end.

    Args:
        engine: generates what is missing.
        prompts: token ids of each prompt.
        sampling: how completions are drawn.
        rows: number of each prompt; all different.
        log: the file; it is made if it is not there.

    Raises:
        ValueError: the log is damaged, or of other prompts; or what `Engine.generate` names.
    """
    found = read_log(log, rows)
    missing = [place for place, row in enumerate(rows) if row not in found]
    if missing:
        with log.open("a", encoding="utf-8") as stream:

            def ended(row: int, completion: Completion) -> None:
                found[row] = completion
                stream.write(_line(row, completion))
                stream.flush()

            asked = [prompts[place] for place in missing], sampling, [rows[place] for place in missing]
            completions = engine.generate(*asked, ended)
        found |= {rows[place]: completion for place, completion in zip(missing, completions, strict=True)}
    return [found[row] for row in rows]


def read_log(log: Path, rows: Sequence[int]) -> dict[int, Completion]:
    """Return the completions of a log by row, empty if there is none; an incomplete last line is removed.

    Raises:
        ValueError: a line is damaged, or of none of the rows.
    """
    with suppress(FileNotFoundError):
        content = log.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            write_atomically(log, content[:whole])
        known = set(rows)
        return dict(_checked(value, place, known, log) for place, value in read_json_lines(log))
    return {}


def _line(row: int, completion: Completion) -> str:
    content = [row, completion.token_ids, completion.finish, completion.seconds]
    return to_json(dict(zip(KEYS, content, strict=True)), indent=None) + "\n"


def _checked(value: Any, place: str, known: set[int], log: Path) -> tuple[int, Completion]:
    row, ids, finish, seconds = (checked_keys(place, value, KEYS)[key] for key in KEYS)
    whole = isinstance(ids, list) and ids and all(type(token) is int and token >= 0 for token in ids)
    timed = seconds is None or type(seconds) in (int, float)
    if row not in known or not whole or finish not in get_args(Finish) or not timed:
        raise ValueError(
            f"{place}: this is no completion of the block: row {str(row)[:20]}, finish {str(finish)[:20]}. Remove "
            f"{log}, and run the same command again."
        )
    return row, Completion(ids, finish, seconds=seconds)
