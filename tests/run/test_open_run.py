"""Taking run folders: fresh, resumed, complete, changed, overwritten; refused input leaves nothing."""

import json
from pathlib import Path

import pytest
import torch

from lit_puzzle.run.folder import is_complete
from lit_puzzle.run.open_run import open_run, opened_run
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
    assert open_run(folder, "a: 2\n", overwrite=True) is False
    assert not is_complete(folder)


def test_a_changed_recipe_is_shown_and_refused(tmp_path):
    open_run(tmp_path / "run", "a: 1\nb: 2\n", overwrite=False)
    (tmp_path / "run" / "half.json").write_text("{}")
    with pytest.raises(ValueError, match=r"(?s)-b: 2.*\+b: 3.*--overwrite"):
        open_run(tmp_path / "run", "a: 1\nb: 3\n", overwrite=False)


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
    config = f"command: export\nrun_dir: {run_dir}\ncards: [{{folder: {run_dir}/model}}]\n"
    with pytest.raises(ValueError, match=r"--overwrite would remove .*run/model, which this recipe names"):
        open_run(run_dir, config, overwrite=True)
    assert (run_dir / "model").is_dir()
    written = config.replace("folder", "dirpath")  # of a checkpoint callback: what the run itself wrote
    assert not open_run(run_dir, written, overwrite=True)
    assert not (run_dir / "model").exists()
