"""The console script: verbs, stages, Lightning runs, overrides, and errors with exit code 2."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lit_puzzle.cli import main
from lit_puzzle.run.open_run import open_run


@dataclass(frozen=True)
class Settings:
    """Nested settings of the stage below."""

    count: int = 3
    rate: float = 2.0


def stage(run_dir: Path, source: Path, settings: Settings = Settings()) -> dict[str, float]:
    """A stage as a user would write it."""
    if not source.exists():
        raise ValueError(f"no {source}")
    (run_dir / "out.json").write_text(json.dumps({"count": settings.count, "rate": settings.rate}))
    return {"sum": settings.count + settings.rate}


def write(path: Path, content: Mapping[str, object]) -> str:
    path.write_text(yaml.safe_dump(dict(content)))
    return str(path)


@pytest.fixture
def stage_recipe(tmp_path):
    content = {
        "command": f"{__name__}.stage",
        "run_dir": str(tmp_path / "run"),
        "source": str(tmp_path),
        "settings": {"count": 4},
    }
    return write(tmp_path / "stage.yaml", content)


@pytest.fixture
def fit_recipe(tmp_path):
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "${run_dir}/checkpoints", "monitor": "step", "mode": "max"},
    }
    trainer = {"max_steps": 3, "logger": False, "accelerator": "cpu", "callbacks": [checkpoint]}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    demo = "lightning.pytorch.demos.boring_classes."
    content = {"command": "fit", "run_dir": str(tmp_path / "fit"), "seed_everything": 1, "trainer": trainer}
    content |= {"model": {"class_path": demo + "BoringModel"}, "data": {"class_path": demo + "BoringDataModule"}}
    return write(tmp_path / "fit.yaml", content)


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_out_of_range_is_one_line(tmp_path, capsys, fit_recipe, seed):
    said = refused(capsys, "run", fit_recipe, f"--seed_everything={seed}")
    assert said.endswith(f"fit.yaml: seed_everything is {seed}; a seed is a whole number from 0 to 4294967295.\n")
    assert not (tmp_path / "fit").exists()


def test_help_lists_the_stages_without_heavy_imports():
    code = "import sys; from lit_puzzle.cli import main; main(['run', '--help']); print('torch' in sys.modules)"
    before = os.times()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert os.times().children_user - before.children_user < 2.0  # CPU seconds: a busy machine changes nothing
    assert said.strip().endswith("False")
    assert all(f"  {name} " in said for name in ("fit", "validate", "assemble", "evaluate"))


def test_stage_runs_with_overrides_and_its_config_is_a_recipe(tmp_path, stage_recipe):
    main(["run", stage_recipe, "--settings.rate=5"])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["results"] == {"sum": 9.0}
    resolved = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(resolved.read_text())["settings"] == {"count": 4, "rate": 5.0}
    main(["run", str(resolved), f"--run_dir={tmp_path / 'again'}"])
    assert json.loads((tmp_path / "again" / "out.json").read_text()) == {"count": 4, "rate": 5.0}


def test_base_merges_dataclasses_field_by_field(tmp_path, stage_recipe):
    extended = write(tmp_path / "b.yaml", {"base": "stage.yaml", "settings": {"rate": 7.0}})
    main(["run", extended])
    assert json.loads((tmp_path / "run" / "out.json").read_text()) == {"count": 4, "rate": 7.0}


def test_complete_runs_are_refused_without_overwrite(tmp_path, capsys, stage_recipe):
    main(["run", stage_recipe])
    assert "--overwrite" in refused(capsys, "run", stage_recipe)
    assert "+  rate: 9.0" in refused(capsys, "run", stage_recipe, "--settings.rate=9")
    main(["run", stage_recipe, "--settings.rate=9", "--overwrite"])
    assert json.loads((tmp_path / "run" / "out.json").read_text())["rate"] == 9.0


def ranked_stage(run_dir: Path) -> dict[str, float]:
    """A stage of several processes: each leaves a file, which nobody else writes."""
    rank = os.environ.get("LOCAL_RANK", "0")
    (run_dir / f"rank{rank}").write_text(str((run_dir / "config.yaml").exists()))
    return {"rank": float(rank)}


def test_processes_of_a_stage_join_the_first_ones_run(tmp_path, monkeypatch, capsys):
    """What a launcher starts again with the same words writes no config and no record of its own."""
    recipe = write(tmp_path / "stage.yaml", {"command": f"{__name__}.ranked_stage", "run_dir": str(tmp_path / "run")})
    with ThreadPoolExecutor(1) as first:
        monkeypatch.setenv("LOCAL_RANK", "1")
        second = first.submit(main, ["run", recipe])  # waits for the first to claim the folder
        time.sleep(0.3)
        assert not second.done() and not (tmp_path / "run").exists()
        resolved = {"command": f"{__name__}.ranked_stage", "run_dir": str(tmp_path / "run")}
        open_run(tmp_path / "run", yaml.safe_dump(resolved, sort_keys=False), overwrite=False)
        second.result(timeout=30)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lit_puzzle_run", "inputs.json", "config.yaml", "rank1"}
    monkeypatch.delenv("LOCAL_RANK")
    main(["run", recipe])  # the first process: takes the folder up, closes the run
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"] == {"rank": 0.0}
    monkeypatch.setenv("RANK", "3")
    words = ["--parent=x", "--plan=y", f"--run_dir={tmp_path / 'other'}"]
    alone = write(tmp_path / "assemble.yaml", {"command": "assemble"})
    assert "assemble runs in one process; this one was started as number 3" in refused(capsys, "run", alone, *words)
    assert not (tmp_path / "other").exists()


def test_bad_input_is_one_message_and_leaves_nothing(tmp_path, capsys, stage_recipe):
    assert "unknown key 'sourc'. Did you mean 'source'?" in refused(capsys, "run", stage_recipe, "--sourc=x")
    assert "settings.count: expected int, got many" in refused(capsys, "run", stage_recipe, "--settings.count=many")
    no_command = write(tmp_path / "n.yaml", {"run_dir": "x"})
    assert "has no `command`" in refused(capsys, "run", no_command)
    assert "command 'fot' does not exist" in refused(capsys, "run", stage_recipe, "--command=fot")
    assert "cannot be imported" in refused(capsys, "run", stage_recipe, "--command=no_such.thing")
    assert "no recipe" in refused(capsys, "run", "nowhere.yaml")
    assert "lightning-sdk" in refused(capsys, "login")
    assert not (tmp_path / "run").exists()


def test_fit_runs_resumes_and_records(tmp_path, capsys, fit_recipe):
    main(["run", fit_recipe])
    (tmp_path / "fit" / "run.json").unlink()
    main(["run", fit_recipe])
    record = json.loads((tmp_path / "fit" / "run.json").read_text())
    assert record["resumed"] is True and record["seed"] == 1
    assert list((tmp_path / "fit" / "checkpoints").iterdir()) == [tmp_path / "fit/checkpoints/epoch=0-step=3.ckpt"]
    message = refused(capsys, "run", fit_recipe, "--trainer.max_stepz=3")
    assert "unknown key 'max_stepz'. Did you mean 'max_steps'?" in message


def test_objects_that_refuse_their_arguments_are_one_message(tmp_path, capsys):
    """Inside a list of callbacks, where the parser wraps the error, too."""
    for words in (["--model.init_args.child=nowhere"], ["--model.init_args.grpo.num_generations=1"]):
        said = refused(capsys, "run", "recipes/rl_recover.yaml", f"--run_dir={tmp_path / 'run'}", *words)
        *_, message = said.strip().splitlines()
        assert message.startswith("error: ") and ("nowhere" in message or "num_generations=1" in message)
    said = refused(capsys, "run", "recipes/rl_recover.yaml", "--model.init_args.evaluation.prompts_per_efort=8")
    assert "unknown key 'prompts_per_efort'. Did you mean 'prompts_per_effort'?" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_loggers_come_from_the_recipe(tmp_path, fit_recipe, logger):
    chosen = {
        "class_path": f"lightning.pytorch.loggers.{logger}",
        "init_args": {"save_dir": "${run_dir}", "name": "log"},
    }
    trainer = {"logger": chosen, "log_every_n_steps": 1}
    trainer["callbacks+"] = [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]
    main(["run", write(tmp_path / "log.yaml", {"base": "fit.yaml", "trainer": trainer})])
    assert len(yaml.safe_load((tmp_path / "fit" / "config.yaml").read_text())["trainer"]["callbacks"]) == 2
    assert any(path.is_file() for path in (tmp_path / "fit" / "log").rglob("*"))


def test_optimizers_and_schedules_come_from_the_recipe(capsys):
    words = ["--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.lr=0.5"]
    words += ["--model.init_args.lr_scheduler=torch.optim.lr_scheduler.ConstantLR", "--print_config"]
    with pytest.raises(SystemExit):
        main(["run", "recipes/rl_recover.yaml", *words])
    arguments = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (
        arguments["optimizer"]["class_path"] == "torch.optim.SGD" and arguments["optimizer"]["init_args"]["lr"] == 0.5
    )
    assert arguments["lr_scheduler"]["class_path"] == "torch.optim.lr_scheduler.ConstantLR"


def test_other_verbs_go_to_the_package_of_the_same_script(tmp_path):
    """A package that calls itself lightning-sdk and has a `lightning` script gets the verb, command line untouched."""
    (tmp_path / "their_cli.py").write_text("import sys\ndef main():\n    print('theirs', sys.argv[1:])\n")
    installed = tmp_path / "lightning_sdk-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[console_scripts]\nlightning = their_cli:main\n")
    command = [sys.executable, "-m", "lit_puzzle", "login", "--fast"]
    said = subprocess.check_output(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True)
    assert said.strip() == "theirs ['login', '--fast']"


def test_a_run_is_shown(tmp_path, capsys, stage_recipe):
    main(["run", stage_recipe])
    capsys.readouterr()
    main(["show", str(tmp_path / "run"), "--samples=1"])
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'run'}: complete\n  recipe   {stage_recipe}\n") and "sum 6.0" not in said
    assert "results\n  sum 6\n" in said
    assert "lightning show" in refused(capsys, "show")
    assert f"{tmp_path} is not a run folder, but contains some: run." in refused(capsys, "show", str(tmp_path))


def test_recipes_can_be_listed_and_copied(tmp_path, capsys):
    main(["recipes"])
    listed = capsys.readouterr().out.split()
    assert "recipes/rl_recover.yaml" in listed
    main(["recipes", "--copy", str(tmp_path / "mine")])
    paths = (tmp_path / "mine").rglob("*.yaml")
    copied = {f"recipes/{path.relative_to(tmp_path / 'mine')}": yaml.safe_load(path.read_text()) for path in paths}
    bases = copied.keys() - set(listed)
    assert len(bases) + len(listed) == len(copied)
    assert bases and not any("command" in copied[path] for path in bases)
    capsys.readouterr()
    assert "not empty" in refused(capsys, "recipes", "--copy", str(tmp_path / "mine"))
