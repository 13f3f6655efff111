"""Hostile inputs: each is refused by name, or gives the right result; no traceback, no hang, nothing silent."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from faults.case import NOTHING, Case, Expected, Right, Trials, refused
from faults.cases import CORPUS, TABLES
from faults.damage import Damage, remove, write

QUICK = tuple(
    next(case for case in table if case.name.startswith(name))
    for table, name in (
        (TABLES["checkpoints"], "missing shard: export"),
        (TABLES["values"], "NaN in one weight: export"),
        (TABLES["configs"], "config: cut: evaluate"),
        (TABLES["templates"], "template: does not compile: evaluate"),
        (TABLES["recipes"], "recipe: a key twice"),
        (TABLES["prompts"], "prompts: not JSON"),
        (TABLES["chains"], "library: importance with NaN"),
        (TABLES["adapters"], "adapter: alpha is NaN"),
        (TABLES["folders"], "run folder: foreign, with a config.yaml, --overwrite"),
    )
)


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len(CORPUS) >= 150
    assert [name for name, count in Counter(case.name for case in CORPUS).items() if count > 1] == []


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_a_share_of_the_corpus(trials: Trials, case: Case) -> None:
    assert trials.fault(case) is None


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CORPUS if case not in QUICK], ids=lambda case: case.name)
def test_the_corpus(trials: Trials, case: Case) -> None:
    assert trials.fault(case) is None


def tried(expected: Expected, damage: Damage = NOTHING, stage: str = "library", **more: Any) -> Case:
    """A case of the judge."""
    return Case("of the judge", "", stage, damage, expected, **more)


@pytest.mark.slow
def test_every_fault_is_seen(trials: Trials) -> None:
    """The judge itself: what is silent, wrong, without the words, slow, or left behind does not pass."""
    gone = remove("runs/importance")
    wrong = {
        "SILENT": tried(refused("x")),
        "message without ['no such words']": tried(refused("runs/importance", "no such words"), gone),
        "exit code 2, a right result expected": tried(Right(), gone),
        "HANG": tried(Right(), seconds=0.01),
        "WRONG RESULT: ['library.json']": tried(Right(words=("--experts=[4]",))),
        "TRACEBACK: KeyError": tried(refused("x"), crashes, "crash.yaml"),
        "BLOCKS": tried(refused("refused late"), writes_first, "late.yaml"),
    }
    for said, case in wrong.items():
        assert (trials.fault(case) or "").startswith(said), said
    for case in (tried(Right()), tried(refused("runs/importance"), gone), tried((refused("x"), Right()))):
        assert trials.fault(case) is None


def crashes(folder: Path) -> None:
    """A stage of the user's that is wrong."""
    write("crashing.py", "def run(run_dir):\n    return {}['x']\n")(folder)
    write("crash.yaml", "command: crashing.run\nrun_dir: out\n")(folder)


def writes_first(folder: Path) -> None:
    """A stage of the user's that writes before it refuses."""
    text = "def run(run_dir):\n    (run_dir / 'x').write_text('')\n    raise ValueError('refused late')\n"
    write("late.py", text)(folder)
    write("late.yaml", "command: late.run\nrun_dir: out\n")(folder)
