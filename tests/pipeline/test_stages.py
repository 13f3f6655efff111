"""Stages of a pipeline: packaged recipes lead every input to an earlier stage; wrong ones are refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_puzzle.cli import main
from lit_puzzle.pipeline.prepared import prepared
from lit_puzzle.pipeline.stages import Stage, read_stages
from lit_puzzle.run.recipe import load_recipe

PACKAGED = ("recipes/pipeline.yaml", "recipes/pipeline_stock.yaml", "recipes/pipeline_recovery.yaml")


def stages_of(name: str) -> dict[str, Stage]:
    recipe, _ = prepared(load_recipe(name), [])
    found = read_stages(Path(recipe.value("run_dir")), recipe.value("stages"), recipe.value("overrides") or {})
    return {stage.name: stage for stage in found}


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], folder: Path, stages: list[Any], *words: str, **keys: Any) -> str:
    path = write(
        folder / "pipeline.yaml", {"command": "pipeline", "run_dir": str(folder / "run"), "stages": stages} | keys
    )
    with pytest.raises(SystemExit) as stopped:
        main(["run", path, *words])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("error: ") and not (folder / "run").exists()
    return message


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_pipelines_read_earlier_stages_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = stages_of(name)
    order = list(stages)
    assert all(order.index(read) < order.index(stage.name) for stage in stages.values() for read in stage.reads)
    assert not any(
        "=runs/" in word and f"={stage.folder.parent}/" not in word for stage in stages.values() for word in stage.wired
    )
    unread = set(order) - {read for stage in stages.values() for read in stage.reads}
    assert unread <= {"serve_check", "evaluate", "frontier", "report"}, "stages whose results nobody takes"


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.slow
def test_every_stage_of_the_packaged_pipelines_parses_with_its_words(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in stages_of(name).values():
        with pytest.raises(SystemExit) as stopped:
            main(["run", *stage.arguments, "--print_config"])
        assert stopped.value.code == 0, stage.name
        text = capsys.readouterr().out
        assert yaml.safe_load(text)["run_dir"] == str(stage.folder)
        others = [line for line in text.splitlines() if " runs/" in line and str(stage.folder.parent) not in line]
        assert others == [], f"{stage.name} reads outside of the pipeline"


def test_the_child_goes_from_stage_to_stage() -> None:
    stages = stages_of("recipes/pipeline.yaml")
    assert stages["score"].wired == ("--library=runs/pipeline/distill_blocks/library",)
    assert stages["score"].reads == ("distill_blocks",)
    assert set(stages["average"].reads) == {"rl_high", "rl_balanced"}
    assert {"--first=runs/pipeline/rl_high/child", "--second=runs/pipeline/rl_balanced/child"} == set(
        stages["average"].wired
    )
    assert "--model.init_args.checkpoint=runs/pipeline/average/child" in stages["calibrate_kv"].wired
    assert set(stages["frontier"].reads) == {"evaluate_parent", "evaluate", "throughput"}


def test_the_stock_pipeline_asks_for_what_stock_runtimes_load() -> None:
    stages = stages_of("recipes/pipeline_stock.yaml")
    space = stages["search"].values["values"]["space"]
    assert space["uniform_experts"] is True and space["windows"] == "unchanged"
    export = stages["export"].values["values"]
    assert export["storage"]["format"] == "stock" and export["kv_scales"] is None


def test_without_vllm_throughputs_are_predicted_and_the_serve_check_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    without = stages_of("recipes/pipeline.yaml")
    assert (
        without["serve_check"].left_out == ".venv-vllm/bin/python is not there" and not without["throughput"].left_out
    )
    assert "Predicted" in without["throughput"].values["values"]["source"]["class_path"]
    (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-vllm" / "bin" / "python").touch()
    there = stages_of("recipes/pipeline.yaml")
    assert not there["serve_check"].left_out
    assert there["throughput"].values["values"]["source"]["class_path"].endswith("Measured")


def test_stages_that_read_one_that_is_left_out_are_left_out_too(tmp_path: Path) -> None:
    entries = [
        {"recipe": "recipes/final_kl.yaml", "needs": str(tmp_path / "nowhere")},
        {"recipe": "recipes/library.yaml"},
        {"recipe": "recipes/generate.yaml"},
    ]
    found = read_stages(tmp_path, entries, {})
    assert [stage.left_out for stage in found] == [
        f"{tmp_path / 'nowhere'} is not there",
        "it reads final_kl, which is left out",
        "",
    ]


def test_a_named_stage_stands_for_a_folder_of_its_name(tmp_path: Path) -> None:
    entries = [
        {"recipe": "recipes/evaluate.yaml", "name": "evaluate_before"},
        {"recipe": "recipes/evaluate.yaml", "overrides": {"baseline": "runs/evaluate_before"}},
    ]
    before, after = read_stages(tmp_path, entries, {"evaluate": {"held_out.seed": 3}})
    assert after.wired == (f"--baseline={tmp_path}/evaluate_before",) and after.reads == ("evaluate_before",)
    assert before.words == () and after.words[-1] == "--held_out.seed=3"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "a list of stages is needed"),
        ([{"name": "x"}], "number 1: recipe is None; the path of a recipe is needed"),
        ([{"recipe": "recipes/library.yaml", "override": {}}], "number 1: unknown key 'override'"),
        ([{"recipe": "recipes/library.yaml", "name": "../x"}], "made of letters, digits"),
        (["recipes/trainer.yaml"], "recipes/trainer.yaml has no run_dir"),
        (["recipes/pipeline.yaml"], "is a pipeline itself"),
        (["recipes/generate.yaml", "recipes/generate.yaml"], "two stages are called 'generate'; give one"),
        (["recipes/library.yaml", "recipes/final_kl.yaml"], "reads the stage 'final_kl', which comes after it"),
        (["recipes/library.yaml"], "no stage makes and which is not there. Add a stage with recipes/final_kl.yaml"),
        (
            [{"recipe": "recipes/evaluate.yaml", "overrides": {"checkpoint": "runs/evaluate/child"}}],
            "the stage's own folder",
        ),
        (
            [{"recipe": "recipes/final_kl.yaml"}, {"recipe": "recipes/library.yaml", "overrides": {"expert": [4]}}],
            "unknown key 'expert'. Did you mean 'experts'",
        ),
    ],
)
def test_a_wrong_pipeline_is_refused_before_anything_runs(
    stages: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, tmp_path, stages)


def test_a_recipe_that_does_not_exist_is_named_with_its_place_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, tmp_path, ["recipes/generate.yaml", "recipes/evaluat.yaml"]) == (
        "error: stages, number 2: There is no recipe 'recipes/evaluat.yaml', on disk or in the package. Did you mean "
        "recipes/evaluate.yaml? `lightning recipes` lists the packaged ones.\n"
    )


def test_stages_that_read_each_other_are_a_circle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = [
        {"recipe": "recipes/generate.yaml"},
        {"recipe": "recipes/search.yaml", "overrides": {"library": "x", "scores": "x"}},
        {"recipe": "recipes/assemble.yaml", "overrides": {"library": "runs/distill_blocks/library"}},
        {"recipe": "recipes/distill_blocks.yaml", "overrides": {"model.init_args.library": "runs/assemble"}},
    ]
    message = refused(capsys, tmp_path, stages)
    assert "stages read each other in a circle: assemble <- distill_blocks <- assemble" in message


def test_overrides_of_stages_that_are_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, tmp_path, ["recipes/generate.yaml"], "--overrides.generated.keep=correct")
    assert "overrides names the stage 'generated'; there are generate" in message
    assert "has no value" in refused(capsys, tmp_path, ["recipes/generate.yaml"], "--overrides.generate.keep=")
    moved = refused(capsys, tmp_path, ["recipes/generate.yaml"], "--overrides.generate.run_dir=elsewhere")
    assert "run_dir is" in moved and "give the stage a `name`" in moved
    assert "overridesX" in refused(capsys, tmp_path, ["recipes/generate.yaml"], "--overridesX.generate.keep=correct")
    needs = [{"recipe": "recipes/generate.yaml", "needs": 5}]
    assert "needs is a path and print_output true or false, got 5, False" in refused(capsys, tmp_path, needs)
    assert "--force is for one stage" in refused(capsys, tmp_path, ["recipes/generate.yaml"], "--force")
