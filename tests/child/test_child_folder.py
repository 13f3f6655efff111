"""A child's folder: its plan is read with its weights, and the plan of another child is refused."""

from pathlib import Path

import pytest
from helpers.small_children import save_plan

from lit_puzzle.child.assemble import assemble
from lit_puzzle.child.folder import ChildFolder
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.spec import Plan

BLOCKS = [((0, 1, 5), 8), ((0, 2), None), ((1, 2), 4), ((0, 1, 2, 3), 16)]


def test_a_folder_is_opened_with_its_plan(tmp_path: Path, parent: Path) -> None:
    plan = save_plan(tmp_path, parent, BLOCKS)
    assemble(tmp_path / "run", parent, plan=plan)
    child = ChildFolder.open(tmp_path / "run" / "child")
    assert child.plan == Plan.load(plan)
    assert child.checkpoint.fingerprint() == Checkpoint(tmp_path / "run" / "child").fingerprint()
    assert ChildFolder.open(parent).plan is None


def test_the_plan_of_another_child_is_refused(tmp_path: Path, parent: Path) -> None:
    assemble(tmp_path / "run", parent, plan=save_plan(tmp_path, parent, BLOCKS))
    save_plan(tmp_path / "run" / "child", parent, [((0, 1), 8), *BLOCKS[1:]])
    with pytest.raises(
        ValueError, match=r"has \[2, 2, 2, 4\] experts .* weights have \[3, 2, 2, 4\]; .* another child"
    ):
        ChildFolder.open(tmp_path / "run" / "child")
