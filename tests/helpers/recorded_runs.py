"""Run folders with the records of runs that never ran: written by the functions that real runs use."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from lit_puzzle.environments.episodes import Episode, Request, Texts, Verdict
from lit_puzzle.run.folder import CONFIG
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import claim_inputs, record_output
from lit_puzzle.run.record import RunClock


def weights(path: object, letter: str) -> Identity:
    """The identity of a checkpoint as an input, with more parts than an output records."""
    return Identity(str(path), {"weights": letter * 64, "config": "0" * 64})


def started_run(run_dir: Path, inputs: Mapping[str, Identity], command: str = "fit") -> Path:
    """An incomplete run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / CONFIG).write_text(yaml.safe_dump({"command": command, "run_dir": str(run_dir)}))
    claim_inputs(run_dir, inputs)
    return run_dir


def complete_run(
    run_dir: Path, inputs: Mapping[str, Identity], child: str, results: Mapping[str, float] | None = None
) -> Path:
    """A complete run that has made `RUN/child`, whose weights have a hash of one letter."""
    started_run(run_dir, inputs)
    record_output(run_dir, "child", Identity(str(run_dir / "child"), {"weights": child * 64}))
    RunClock().close(run_dir, Path("recipes/some.yaml"), 7, False, results or {})
    return run_dir


def answer(row: int, reason: str = "wrong", completion: str = "some completion", effort: str = "low") -> Episode:
    """A graded completion with texts."""
    texts = Texts(f"prompt {row}", completion, f"gold {row}")
    verdict = Verdict(1.0 if reason == "right" else 0.0, reason)
    finish = "length" if reason == "cut off" else "stop"
    return Episode("sums", effort, 1000 + row, verdict, 12, finish, row=row, request=Request(9, 0.5), texts=texts)  # type: ignore[arg-type]
