"""Files of hidden states: what counts as complete, and a disk that is full."""

import resource
from pathlib import Path

import pytest
import torch

from lit_puzzle.model.state_files import StateFiles


def files(folder: Path, tokens: int = 4) -> StateFiles:
    return StateFiles(folder, tokens, 3, torch.bfloat16, "hash")


def fill(states: StateFiles, layer: int) -> None:
    with states.write("parent", layer) as states_ND:
        states_ND.fill_(layer + 1)


def test_a_file_that_was_cut_counts_as_none(tmp_path: Path) -> None:
    fill(states := files(tmp_path / "states"), 0)
    fill(states, 1)
    assert states.layers("parent") == [0, 1] and bool((states.read("parent", 1) == 2).all())
    whole = (tmp_path / "states" / "parent.1").read_bytes()
    (tmp_path / "states" / "parent.1").write_bytes(whole[:-2])
    again = files(tmp_path / "states")
    assert again.layers("parent") == [0] and not again.has("parent", 1) and again.has("parent", 0)
    fill(again, 1)
    assert again.has("parent", 1)


def test_no_room_on_the_disk_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    states = files(tmp_path / "states", tokens=200_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk, refused by the system
    try:
        with pytest.raises(ValueError, match=r"parent\.0\.partial needs 0\.00 GiB of hidden states"):
            fill(states, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert states.layers("parent") == []
    fill(states, 0)
    assert states.layers("parent") == [0]


def test_no_tokens_are_files_too(tmp_path: Path) -> None:
    fill(states := files(tmp_path / "states", tokens=0), 0)
    assert states.has("parent", 0) and states.read("parent", 0).shape == (0, 3)


def test_a_file_of_the_same_size_that_was_not_written_here_counts_as_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(states := files(tmp_path / "states"), 0)
    fill(states, 1)
    assert files(tmp_path / "states").layers("parent") == [0, 1] and capsys.readouterr().out == ""
    (tmp_path / "states" / "parent.1").write_bytes((tmp_path / "states" / "parent.0").read_bytes())
    (tmp_path / "states" / "parent.0.hash").unlink()
    (tmp_path / "states" / "sums.0").write_bytes(bytes(4 * 3 * 2))  # of a stage, and of the size of states
    assert files(tmp_path / "states").layers("parent") == []
    said = capsys.readouterr().out
    assert "parent.1 is not as it was written; its states are computed again" in said and "parent.0" not in said
    fill(again := files(tmp_path / "states"), 0)
    again.remove("parent")
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["record.json", "sums.0"]
