"""Run folders as commands see them: locks, --overwrite, changed keys, secrets, signals, damaged checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_puzzle.cli import main
from lit_puzzle.run.config_changes import compare_configs
from lit_puzzle.run.lock import locked
from lit_puzzle.run.recipe import load_recipe
from lit_puzzle.training.lightning import RecipeCLI

DEMO = "lightning.pytorch.demos.boring_classes."


def waiting_stage(run_dir: Path, seconds: float = 0.0, fails: bool = False, name: str = "x") -> dict[str, float]:
    """A stage that writes a file, and may wait or fail before."""
    if fails:
        raise ValueError("refused by the stage")
    (run_dir / "out.csv").write_text(name)
    (run_dir / "begun").write_text("")
    time.sleep(seconds)
    return {"seconds": seconds}


def write(path: Path, content: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    content = {"command": f"{__name__}.waiting_stage", "run_dir": str(tmp_path / "run")}
    return write(tmp_path / "stage.yaml", content)


@pytest.fixture
def fit(tmp_path: Path) -> str:
    checkpoints = {
        "class_path": "lit_puzzle.training.checkpoints.UpdateCheckpoint",
        "init_args": {"every_n_updates": 2, "keep": 2},
    }
    trainer: dict[str, Any] = {"max_steps": 6, "logger": False, "accelerator": "cpu", "callbacks": [checkpoints]}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    content = {"command": "fit", "run_dir": str(tmp_path / "fit"), "seed_everything": 1, "trainer": trainer}
    content |= {"model": {"class_path": DEMO + "BoringModel"}, "data": {"class_path": DEMO + "BoringDataModule"}}
    return write(tmp_path / "fit.yaml", content)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    *_, message = capsys.readouterr().err.strip().splitlines()
    return message


def test_a_folder_in_use_is_refused_with_and_without_overwrite(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", recipe])
    with locked(tmp_path / "run"):
        for words in ([], ["--overwrite"]):
            assert f"is in use by process {os.getpid()}" in refused(capsys, "run", recipe, *words)
    assert (tmp_path / "run" / "out.csv").is_file()
    main(["run", recipe, "--overwrite"])


def test_overwrite_removes_what_the_run_has_made_and_nothing_else(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", recipe])
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "contains thesis.tex, which this run has not made" in refused(capsys, "run", recipe, "--overwrite")
    assert "is complete" in refused(capsys, "run", recipe)  # which does not make it the run's
    assert "contains thesis.tex" in refused(capsys, "run", recipe, "--overwrite")
    (tmp_path / "run" / "thesis.tex").unlink()
    main(["run", recipe, f"--run_dir={tmp_path / 'run' / 'inner'}"])
    assert "contains the run in inner" in refused(capsys, "run", recipe, "--overwrite")
    project = tmp_path / "project"
    write(project / "config.yaml", {"command": "train"})
    (project / ".git").mkdir()
    for words in ([], ["--overwrite"]):
        assert "not a run folder" in refused(capsys, "run", recipe, f"--run_dir={project}", *words)
    assert (project / ".git").is_dir() and (project / "config.yaml").is_file()


def test_a_failed_first_check_never_blocks_the_corrected_command(
    tmp_path: Path, recipe: str, fit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "refused by the stage" in refused(capsys, "run", recipe, "--fails=true")
    main(["run", recipe])
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "fit")}}
    scales = {"class_path": "lit_puzzle.callbacks.fp8_kv_scales.FP8KVScales"}  # which BoringModel cannot have
    words = [f"--trainer.callbacks={json.dumps([scales])}", f"--trainer.logger={json.dumps(logger)}"]
    assert "FP8KVScales was given BoringModel" in refused(capsys, "run", fit, *words)
    main(["run", fit])


def test_harmless_changes_are_recorded_on_resume(tmp_path: Path, fit: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", fit])
    (tmp_path / "fit" / "run.json").unlink()
    assert "different recipe" in refused_text(capsys, "run", fit, "--trainer.gradient_clip_val=1")
    main(["run", fit, "--trainer.max_steps=8", "--trainer.log_every_n_steps=3"])
    record = json.loads((tmp_path / "fit" / "inputs.json").read_text())
    assert [(change["key"], change["now"]) for change in record["changes"]] == [
        ("trainer.max_steps", 8),
        ("trainer.log_every_n_steps", 3),
    ]
    assert yaml.safe_load((tmp_path / "fit" / "config.yaml").read_text())["trainer"]["max_steps"] == 8
    assert json.loads((tmp_path / "fit" / "run.json").read_text())["resumed"]
    assert {path.name for path in (tmp_path / "fit" / "checkpoints").iterdir()} == {"step=6.ckpt", "step=8.ckpt"}


def refused_text(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        main(words)
    return capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_left_out_with_a_warning(
    tmp_path: Path, fit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", fit])
    (tmp_path / "fit" / "run.json").unlink()
    newest = tmp_path / "fit" / "checkpoints" / "step=6.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content)
    capsys.readouterr()
    main(["run", fit])
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "step=6.ckpt" in warnings[0] and "the checkpoint before it is used" in warnings[0]
    assert json.loads((tmp_path / "fit" / "run.json").read_text())["resumed"]


def test_secrets_of_the_environment_stay_references_on_disk(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_PUZZLE_TOKEN", "s3cret-value")
    content = yaml.safe_load(Path(recipe).read_text()) | {"name": "${oc.env:LIT_PUZZLE_TOKEN}"}
    main(["run", write(tmp_path / "secret.yaml", content)])
    run = tmp_path / "run"
    assert (run / "out.csv").read_text() == "s3cret-value"
    (run / "out.csv").unlink()
    assert all("s3cret" not in path.read_text() for path in run.iterdir())
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "${oc.env:LIT_PUZZLE_TOKEN}"
    main(["run", str(run / "config.yaml"), f"--run_dir={tmp_path / 'again'}"])
    assert (tmp_path / "again" / "out.csv").read_text() == "s3cret-value"


def test_numbers_that_are_none_and_repeated_keys_are_refused(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "seconds is NaN, which is not a number" in refused(capsys, "run", recipe, "--seconds=.nan")
    (tmp_path / "twice.yaml").write_text(f"{Path(recipe).read_text()}seconds: 1\nseconds: 2\n")
    assert "given twice" in refused(capsys, "run", str(tmp_path / "twice.yaml"))
    assert "given twice" in refused(capsys, "run", recipe, f"--config={tmp_path / 'twice.yaml'}")
    assert not (tmp_path / "run").exists()


def test_a_packaged_recipe_is_a_base_anywhere_and_modules_lie_beside_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(mine / "own.yaml", {"base": "recipes/rl_recover.yaml", "run_dir": str(tmp_path / "run")})
    write(mine / "stage.yaml", {"command": "beside_the_recipe.stage", "run_dir": str(tmp_path / "run")})
    code = "def stage(run_dir):\n    (run_dir / 'a').write_text('a')\n    return {'one': 1.0}\n"
    (mine / "beside_the_recipe.py").write_text(
        "from pathlib import Path\n" + code.replace("run_dir)", "run_dir: Path)")
    )
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit):
        main(["run", str(mine / "own.yaml"), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 100
    main(["run", str(mine / "stage.yaml")])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"] == {"one": 1.0}
    assert "no packaged recipe has this name" in refused(
        capsys, "run", write(mine / "wrong.yaml", {"base": "recipes/no_such.yaml"})
    )


def test_more_steps_of_a_packaged_recipe_need_its_schedule_pinned() -> None:
    """Its learning rate falls until `max_steps`: a longer run has another schedule, unless it keeps the former one."""

    def resolved(*words: str) -> dict[str, Any]:
        cli = RecipeCLI(load_recipe("recipes/rl_recover.yaml"), words)
        content: dict[str, Any] = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))
        return content

    before, longer = resolved(), resolved("--trainer.max_steps=200")
    difference, _ = compare_configs(before, longer, ())
    changed = [line for line in difference.splitlines() if line.startswith(("-  ", "+  "))]
    assert [line.split() for line in changed] == [["-", "total_iters:", "100"], ["+", "total_iters:", "200"]]
    pinned = resolved("--trainer.max_steps=200", "--model.init_args.lr_scheduler.init_args.total_iters=100")
    assert compare_configs(before, pinned, ())[0] == ""


SLOW_MODEL = """
import time
from lightning.pytorch.demos.boring_classes import BoringModel
class Slow(BoringModel):
    def training_step(self, batch, batch_idx):
        time.sleep(0.3)
        return super().training_step(batch, batch_idx)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_fit_saves_the_update_and_is_one_line(tmp_path: Path, fit: str, number: int, code: int) -> None:
    (tmp_path / "slow_model.py").write_text(SLOW_MODEL)
    words = ["run", fit, "--model.class_path=slow_model.Slow", "--trainer.max_steps=60"]
    words.append(
        '--trainer.callbacks=[{"class_path": "lit_puzzle.training.checkpoints.UpdateCheckpoint", '
        '"init_args": {"every_n_updates": 4}}]'
    )
    command = [sys.executable, "-m", "lit_puzzle", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while not (tmp_path / "fit" / "checkpoints" / "step=4.ckpt").is_file():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.45)  # in the middle of an update
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "stopped by" in said.splitlines()[-1] and "Traceback" not in said
    saved = {int(path.stem.partition("=")[2]) for path in (tmp_path / "fit" / "checkpoints").iterdir()}
    assert max(saved) % 4 != 0 and not (tmp_path / "fit" / "run.json").exists()
    assert not (tmp_path / "fit" / ".lit_puzzle_lock").exists()


@pytest.mark.slow
def test_a_signal_during_a_stage_is_one_line_and_the_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "own_stage.py").write_text(
        "import time\nfrom pathlib import Path\ndef stage(run_dir: Path, seconds: float = 60.0) -> dict[str, float]:\n"
        "    (run_dir / 'begun').write_text('')\n    time.sleep(seconds)\n    return {}\n"
    )
    recipe = write(tmp_path / "own.yaml", {"command": "own_stage.stage", "run_dir": str(tmp_path / "run")})
    command = [sys.executable, "-m", "lit_puzzle", "run", recipe]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "run" / "begun").is_file():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and said == "stopped by SIGTERM: the same command continues the run.\n"
    assert "time.sleep" not in said
