"""Taking run folders: fresh, resumed, complete, changed, overwritten; refused input leaves nothing."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lit_puzzle.run.folder import is_complete
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import claim_inputs, recorded_inputs, run_date
from lit_puzzle.run.marker import write_marker
from lit_puzzle.run.open_run import open_run, opened_run, write_errors
from lit_puzzle.run.record import RunClock


def test_fresh_then_resumed_then_complete(tmp_path):
    folder = tmp_path / "run"
    assert open_run(folder, "a: 1\n", overwrite=False) is False
    assert open_run(folder, "a: 1\n", overwrite=False) is False  # nothing is there to be resumed
    (folder / "scores.json").write_text("{}")
    assert open_run(folder, "a: 1\n", overwrite=False) is True
    assert not is_complete(folder)
    RunClock().close(folder, Path("recipes/x.yaml"), 3, resumed=True, results={"accuracy": 0.5})
    record = json.loads((folder / "run.json").read_text())
    assert record["results"] == {"accuracy": 0.5}
    assert record["seed"] == 3 and record["resumed"] is True
    assert record["versions"]["torch"] == torch.__version__
    assert {"highspy", "numpy", "aiconfigurator-core", "pyarrow"} <= record["versions"].keys()
    assert record["seconds"] >= 0 and record["peak_memory_gib"]["cpu"] > 0.05
    with pytest.raises(ValueError, match="is complete; give --overwrite"):
        open_run(folder, "a: 1\n", overwrite=False)
    write_marker(folder, files=["scores.json"])
    assert open_run(folder, "a: 2\n", overwrite=True) is False
    assert not is_complete(folder)


def test_a_changed_recipe_is_shown_and_refused(tmp_path):
    open_run(tmp_path / "run", "a: 1\nb: 2\n", overwrite=False)
    (tmp_path / "run" / "half.json").write_text("{}")
    with pytest.raises(ValueError, match=r"(?s)-b: 2.*\+b: 3.*--overwrite"):
        open_run(tmp_path / "run", "a: 1\nb: 3\n", overwrite=False)


def test_a_complete_run_names_the_keys_that_differ(tmp_path):
    """Where an input lies may change when a run is resumed; a complete one says that it was made with another."""
    folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    open_run(folder, "parent: a\n", overwrite=False)
    claim_inputs(folder, {"parent": Identity("a", {"weights": "0"})})
    RunClock().close(folder, Path("recipes/x.yaml"), 3, resumed=False, results={})
    with pytest.raises(ValueError, match=r"is complete, made with other keys \(parent: a -> .*other\)"):
        open_run(folder, f"parent: {other}\n", overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a run folder"):
        open_run(tmp_path, "a: 1\n", overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_refused_input_leaves_no_folder_but_work_stays(tmp_path):
    def work(folder: Path, written: bool) -> None:
        (folder / "lightning_logs" / "version_0").mkdir(parents=True)
        (folder / "lightning_logs" / "version_0" / "hparams.yaml").write_text("{}")
        if written:
            (folder / "half.json").write_text("{}")
        raise ValueError("bad input")

    for written in (False, True):
        folder = tmp_path / f"run{written}"
        with pytest.raises(ValueError, match="bad input"), opened_run(folder, "a: 1\n", overwrite=False):
            work(folder, written)
        assert folder.exists() is written


def test_overwrite_spares_what_the_recipe_reads(tmp_path):
    run_dir = tmp_path / "run"
    open_run(run_dir, "command: export\n", overwrite=False)
    (run_dir / "model").mkdir()
    (run_dir / "model" / "config.json").write_text("{}")
    write_marker(run_dir, files=["model/config.json"])
    config = f"command: export\nrun_dir: {run_dir}\ncards: [{{folder: {run_dir}/model}}]\n"
    with pytest.raises(ValueError, match=r"--overwrite would remove .*run/model, which this recipe names"):
        open_run(run_dir, config, overwrite=True)
    assert (run_dir / "model").is_dir()
    written = config.replace("folder", "dirpath")  # of a checkpoint callback: what the run itself wrote
    assert not open_run(run_dir, written, overwrite=True)
    assert not (run_dir / "model").exists()


def test_a_folder_of_the_user_is_left_when_the_command_is_refused(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ValueError("bad input")

    with pytest.raises(ValueError, match="bad input"), opened_run(tmp_path, "a: 1\n", overwrite=False):
        refuse()
    assert tmp_path.is_dir() and not any(tmp_path.iterdir())


def test_an_attempt_without_results_starts_anew_with_its_date(tmp_path: Path) -> None:
    """The same recipe keeps config.yaml in place: other processes may have read it."""
    open_run(tmp_path, "a: 1\n", overwrite=False)
    claim_inputs(tmp_path, {"parent": Identity("a", {"weights": "1"})})
    (tmp_path / "calibration.jsonl").write_text("of the former prompts")
    file = tmp_path / "inputs.json"
    file.write_text(file.read_text().replace(run_date(tmp_path), "2020-02-29"))
    assert open_run(tmp_path, "a: 1\n", overwrite=False) is False
    assert run_date(tmp_path) == "2020-02-29" and recorded_inputs(tmp_path) == {}
    assert not (tmp_path / "calibration.jsonl").exists()
    assert open_run(tmp_path, "a: 2\n", overwrite=False) is False
    assert run_date(tmp_path) != "2020-02-29" and (tmp_path / "config.yaml").read_text() == "a: 2\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a/b"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed: file write failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_error_of_the_user(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(ValueError, match="cannot be written: ") as refused, write_errors(tmp_path):
        raise error
    named = error.filename if isinstance(error, OSError) and error.filename else str(tmp_path)
    assert str(refused.value).startswith(f"{named} cannot")


def test_other_errors_of_libraries_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape"), write_errors(tmp_path):
        raise RuntimeError("shape mismatch")


def test_the_reason_is_that_of_the_first_error(tmp_path: Path) -> None:
    """`torch.save` raises another error while that of the disk is on its way."""

    def save() -> None:
        try:
            raise OSError(errno.EFBIG, "File too large")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(ValueError, match=r" cannot be written: File too large\. Make room"), write_errors(tmp_path):
        save()
    with pytest.raises(ValueError, match=r"unexpected pos 704 vs 598 \(probably No space"), write_errors(tmp_path):
        raise RuntimeError("unexpected pos 704 vs 598")


def test_the_marker_of_a_killed_attempt_is_finished_by_the_next(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"..lit_puzzle_run.{dead.pid}").write_text("{")  # killed before the rename
    with opened_run(tmp_path, "a: 1\n", overwrite=False):
        assert not (tmp_path / f"..lit_puzzle_run.{dead.pid}").exists()


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nnn cannot be a run folder: File name too long\. Choose another --run_dir"):
        open_run(tmp_path / ("n" * 300), "a: 1\n", overwrite=False)


def test_an_empty_config_is_one_line_with_and_without_the_marker(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="is not empty and not a run folder of this version"):
        open_run(tmp_path, "a: 1\n", overwrite=False)
    write_marker(tmp_path)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.yaml has no recipe\. Restore the file, or give --overwrite"):
        open_run(tmp_path, "a: 1\n", overwrite=False)
    (tmp_path / "scores.json").unlink()  # nothing is lost
    assert open_run(tmp_path, "a: 1\n", overwrite=False) is False


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json"])
def test_results_of_nobody_knows_what_are_not_resumed(tmp_path: Path, name: str) -> None:
    open_run(tmp_path / "run", "a: 1\n", overwrite=False)
    (tmp_path / "run" / "half.json").write_text("{}")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(ValueError, match=rf"run has results, but no {name}.* give --overwrite"):
        open_run(tmp_path / "run", "a: 1\n", overwrite=False)
