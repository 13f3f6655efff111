"""`lightning run RECIPE --plan`: fast, without torch, for recipes whose inputs are not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lit_puzzle.cli import LIGHTNING_COMMANDS, STAGES, main
from lit_puzzle.footprint.before_run import check_fit
from lit_puzzle.footprint.fit import fits, with_value
from lit_puzzle.footprint.plan import Plan, make_plan, split_words
from lit_puzzle.footprint.table import plan_lines, short_line
from lit_puzzle.model.layout import count_parameters
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.commands import PIPELINE
from lit_puzzle.run.footprint import GIB, Device
from lit_puzzle.run.recipe import load_recipe, packaged_recipes
from lit_puzzle.run.recipe_values import Values

RL, KD = "recipes/gpt_oss_20b/rl_recover.yaml", "recipes/gpt_oss_20b/distill.yaml"


def planned(name: str, *words: str) -> Plan:
    recipe = load_recipe(name)
    plan = make_plan(recipe, recipe.value("command"), None, ["--plan", *words])
    assert plan is not None
    return plan


def test_a_plan_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from lit_puzzle.cli import main;"
        f"main(['run', {RL!r}, '--plan']);"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory of each device" in done.stdout and "peak" in done.stdout


def test_json_holds_every_part_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", KD, "--plan", "--json", "--gpus=8", "--gpu=H100"])
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] == max(sum(parts.values()) for parts in found["phases"].values())
    assert found["device"]["count"] == 8 and found["seconds"] > 0
    assert any("is not there" in note for note in found["notes"])


def test_twice_the_devices_halve_what_is_shared() -> None:
    eight, sixteen = (planned(KD, f"--gpus={count}", "--gpu=H100") for count in (8, 16))
    parts = [dict(next(p for p in plan.footprint.phases if p.name == "update").parts) for plan in (eight, sixteen)]
    for shared in ("weights", "gradients", "optimizer", "trained, in float32", "parent"):
        assert parts[0][shared] == pytest.approx(2 * parts[1][shared])
    for whole in ("inputs of layers", "gathered layers"):
        assert parts[0][whole] == parts[1][whole] > 0


def test_advice_is_true_and_the_next_larger_value_does_not_fit() -> None:
    large = ["--gpus=8", "--gpu=A100", "--model.init_args.training.moe_chunk_tokens=null"]
    plan = planned(KD, *large, "--data.init_args.sequence_tokens=131072")
    word = next(line.split("(")[1].rstrip(")") for line in plan.advice if "sequences of" in line and "fits at" in line)
    assert not planned(KD, *large, word).advice
    tokens = int(word.partition("=")[2]) + 131072 // 16
    assert planned(KD, *large, f"--data.init_args.sequence_tokens={tokens}").advice


def test_overrides_change_the_plan() -> None:
    short = planned(RL, "--gpus=8", "--gpu=H100", "--model.init_args.grpo.sampling.max_new_tokens=1024")
    long = planned(RL, "--gpus=8", "--gpu=H100")
    bytes_of = [next(p for p in plan.footprint.phases if p.name == "update").peak_bytes for plan in (short, long)]
    assert bytes_of[0] < 0.7 * bytes_of[1] and not short.advice


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu=H101"], "unknown GPU 'H101'; allowed"),
        (["--gpus=0"], "--gpus=0 was given"),
        (["--gpus=many"], "--gpus=many was given; a whole number"),
        (["--gpus=²"], "--gpus=² was given; a whole number"),
        (["--model.init_args.child=null"], "model.init_args.child is None; a path is needed"),
        (["--model.init_args.grpo.completions_per_device=0"], "is 0; a whole number of at least 1"),
        (["--model.init_args.grpo.sampling.max_new_tokens=-5"], "is -5; a whole number of at least 0"),
        (["--trainer.devices=abc"], "trainer.devices is 'abc'; a number of at least 1, a list of indices, auto or -1"),
        (["--trainer.devices=0"], "trainer.devices is 0; a number"),
        (["--trainer.devices=-2"], "trainer.devices is -2; a number"),
        (["--trainer.devices=[]"], r"trainer.devices is \[\]; a number"),
        (["--trainer.devices=[1, 1]"], r"trainer.devices is \[1, 1\]; a number"),
        (["--trainer.devices=true"], "trainer.devices is True; a number"),
        (["--trainer.num_nodes=abc"], "num_nodes is 'abc'; a whole number"),
        (["--model.init_args.training.dtype=int7"], "no plan can be made of this recipe: .*'int7'"),
        (["--model.init_args.grpo.sampling.max_tokens=3"], "Did you mean 'max_new_tokens'"),
        (["--model.init_args.child=nowhere"], "nowhere is not there"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(RL, *words)


@pytest.mark.parametrize(
    ("word", "count"), [("-1", 8), ("auto", 8), ("3", 3), ("[0, 5]", 2), ("'1,'", 1), ("'0,2,3'", 3)]
)
def test_devices_of_a_trainer(word: str, count: int) -> None:
    assert planned(RL, f"--trainer.devices={word}", "--gpu=H100").device.count == count
    assert planned(RL, f"--trainer.devices={word}", "--gpu=H100", "--gpus=4").device.count == 4


def test_options_are_taken_from_the_words_and_overrides_are_not() -> None:
    options, rest = split_words(["--plan", "--gpus=4", "--plan=runs/search/plan.json", "--json", "--manual.experts=3"])
    assert options == {"plan": "", "gpus": "4", "json": ""}
    assert rest == ["--plan=runs/search/plan.json", "--manual.experts=3"]


def test_a_plan_of_code_of_the_user_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("command: my.own.stage\nrun_dir: runs/x\n")
    with pytest.raises(SystemExit):
        main(["run", str(recipe), "--plan"])


def test_what_a_device_can_use() -> None:
    gpu, cpu = Device("H100", "cuda", 8, 80 * GIB), Device("cpu", "cpu", 4, 8 * GIB)
    assert 75 * GIB < gpu.usable_bytes < 77 * GIB and cpu.usable_bytes == 2 * GIB
    assert fits(planned("recipes/distill.yaml", "--gpus=1", "--gpu=cpu").footprint, cpu)


def test_a_value_is_replaced_at_its_place_only() -> None:
    values = Values({"a": {"b": 1, "c": 2}})
    assert with_value(values, "a.b", 3).content == {"a": {"b": 3, "c": 2}} and values.at("a.b") == 1


def test_every_packaged_recipe_has_a_plan_and_it_is_computed_without_its_inputs() -> None:
    for relative in packaged_recipes():
        recipe = load_recipe(str(Path("recipes") / relative))
        command = recipe.value("command")
        if command == PIPELINE:  # tests/pipeline/test_pipeline_plan.py
            continue
        target = None if command in LIGHTNING_COMMANDS else STAGES[command][0]
        for words in (["--gpus=8", "--gpu=H100"], ["--gpus=2", "--gpu=cpu"], []):
            plan = make_plan(recipe, command, target, words)
            assert plan is not None and plan.footprint.peak_bytes > 0, relative
            assert all(count >= 0 for phase in plan.footprint.phases for count in phase.parts.values()), relative
            assert len(plan_lines(plan)) > 5 and short_line(plan).startswith("plan: ")


def test_the_larger_parent_is_told_apart_by_its_folder() -> None:
    layers = [planned_config(Path(f"models/gpt-oss-{name}")).config["num_hidden_layers"] for name in ("20b", "120b")]
    assert layers == [24, 36]
    assert count_parameters(planned_config(Path("models/gpt-oss-120b")).config) == 116_829_156_672


def test_a_run_with_values_of_a_wrong_kind_is_left_to_its_stage() -> None:
    recipe = load_recipe(RL)
    for word in ("--model.init_args.child=null", "--model.init_args.training.dtype=int7", "--trainer.max_steps=null"):
        check_fit(recipe, recipe.value("command"), None, [word], force=False)


@pytest.mark.parametrize(("text", "message"), [("not json", "config.json"), ("[1, 2]", "must hold a JSON object")])
def test_a_strange_config_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        planned("recipes/gpt_oss_20b/importance.yaml", f"--model.init_args.parent={tmp_path}")
    assert type(error.value) is ValueError
