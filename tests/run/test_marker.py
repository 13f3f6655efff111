"""What of a run folder may be removed: only what runs have made; and what counts as a result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_puzzle.run.marker import (
    MARKER,
    check_removable,
    has_results,
    is_unclaimed,
    noted_before,
    noted_files,
    remove_contents,
    remove_temporary,
    write_marker,
)


def test_what_a_run_has_made_may_be_removed(tmp_path: Path) -> None:
    write_marker(tmp_path)
    with noted_files(tmp_path, False):
        for name in ("config.yaml", "run.json", "scores.json", "hidden_states.0", ".scores.json.123", "kv_scales.png"):
            (tmp_path / name).write_text("")
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "step=1.ckpt").write_text("")
    check_removable(tmp_path)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"contains checkpoints/notes\.txt, which this run has not made"):
        check_removable(tmp_path)


@pytest.mark.parametrize("notes_all", [True, False])
def test_names_of_their_own_are_noted_where_code_of_the_user_writes(tmp_path: Path, notes_all: bool) -> None:
    write_marker(tmp_path)
    with noted_files(tmp_path, notes_all):
        (tmp_path / "own.csv").write_text("")
    if notes_all:
        check_removable(tmp_path)
    else:  # a file that a user has put there during a long run
        with pytest.raises(ValueError, match=r"contains own\.csv"):
            check_removable(tmp_path)


def test_after_a_kill_the_names_that_stages_give_may_be_removed(tmp_path: Path) -> None:
    write_marker(tmp_path, is_running=True)
    (tmp_path / "candidates").mkdir()
    (tmp_path / "candidates" / "layer=0,window=4.json").write_text("")
    check_removable(tmp_path)
    (tmp_path / "own.csv").write_text("")
    with pytest.raises(ValueError, match=r"contains own\.csv"):
        check_removable(tmp_path)


def test_files_that_came_between_two_attempts_are_foreign(tmp_path: Path) -> None:
    write_marker(tmp_path)
    with noted_files(tmp_path, True):
        (tmp_path / "first.csv").write_text("")
    (tmp_path / "thesis.tex").write_text("years of work")
    with noted_files(tmp_path, True):
        (tmp_path / "second.csv").write_text("")
    with pytest.raises(ValueError, match=r"contains thesis\.tex, which this run has not made"):
        check_removable(tmp_path)


def test_an_attempt_that_fails_notes_its_files_too(tmp_path: Path) -> None:
    def fail() -> None:
        (tmp_path / "own.csv").write_text("")
        raise KeyError

    write_marker(tmp_path)
    with pytest.raises(KeyError), noted_files(tmp_path, True):
        fail()
    check_removable(tmp_path)


def test_runs_inside_and_folders_without_a_marker_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match=f"has no {MARKER}"):
        check_removable(tmp_path)
    write_marker(tmp_path)
    (tmp_path / "child" / "deeper").mkdir(parents=True)
    write_marker(tmp_path / "child" / "deeper")
    with pytest.raises(ValueError, match="contains the run in child/deeper"):
        check_removable(tmp_path)


def test_logs_and_packed_documents_are_no_results(tmp_path: Path) -> None:
    write_marker(tmp_path)
    for name in ("lightning_logs/version_0", "packed/train", "checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").write_text("{}")
    (tmp_path / ".importance.json.77").write_text("half")
    assert not has_results(tmp_path)
    (tmp_path / "checkpoints" / "step=1.ckpt").write_text("")
    assert has_results(tmp_path)


def test_a_folder_that_was_just_made_is_unclaimed(tmp_path: Path) -> None:
    assert is_unclaimed(tmp_path / "nowhere") and is_unclaimed(tmp_path)
    (tmp_path / f".{MARKER}.123").write_text("")  # killed while it wrote the marker
    (tmp_path / ".lit_puzzle_lock").write_text("")
    assert is_unclaimed(tmp_path)
    (tmp_path / "a").write_text("")
    assert not is_unclaimed(tmp_path)


def test_links_are_removed_but_not_what_they_point_to(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "documents").symlink_to(tmp_path / "data")
    remove_contents(tmp_path / "run")
    assert (tmp_path / "data" / "precious").is_file() and not any((tmp_path / "run").iterdir())


def test_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_marker(tmp_path)
    (tmp_path / "candidates").mkdir()
    kept = [tmp_path / f".scores.json.{os.getpid()}", tmp_path / ".hidden", tmp_path / "scores.json"]
    removed = [tmp_path / f".scores.json.{dead.pid}", tmp_path / "candidates" / f".layer=0,window=4.json.{dead.pid}"]
    for path in (*kept, *removed):
        path.write_text("")
    remove_temporary(tmp_path)
    assert [path.exists() for path in (*kept, *removed)] == [True, True, True, False, False]


def test_a_folder_without_marker_loses_only_what_bookkeeping_left(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, other = tmp_path / f".{MARKER}.{dead.pid}", tmp_path / f".notes.{dead.pid}"
    for path in (left, other):
        path.write_text("")
    remove_temporary(tmp_path)
    assert not left.exists() and other.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is not JSON.* Remove .* yourself, or choose another --run_dir"),
        ('{"format": 1, "files": 3}', "files must be a list of names, got 3"),
        ('{"format": 2, "version": "9.0", "files": []}', "has format 2, this version reads 1.* with version 9.0"),
    ],
)
def test_damaged_marker_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MARKER).write_text(content)
    for read in (noted_before, check_removable):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
