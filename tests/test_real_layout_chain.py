"""The recipes of gpt-oss-20b, one after the other, on a small parent in gpt-oss's layout: overridden are sizes only."""

import json
import re
from pathlib import Path

import pytest
from helpers.real_layout import write_parent, write_prompts
from pyarrow.parquet import read_table
from transformers import AutoTokenizer

from lit_puzzle.cli import main
from lit_puzzle.evaluate.accuracy import read_episodes
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.spec import Plan

ENGINE = ["--engine.name=transformers", "--engine.batch_size=32"]
CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
TRAIN = [*CPU, "--trainer.max_steps=2", "--trainer.accumulate_grad_batches=1", "--trainer.val_check_interval=2"]
TARGET = (
    "[{scenario: {gpu: H100, num_gpus: 1, prompt_tokens: 65536, generated_tokens: 65536, kv_dtype: fp8, "
    "expert_dtype: mxfp4}, budget: {throughput_over_parent: 1.02}}]"
)
FAR = (
    "[{class_path: lit_puzzle.evaluate.long_context.LongContextAccuracy, init_args: {problems: {context_tokens: 2048, "
    "efforts: [high], problems_per_effort: 4}, sampling: {max_new_tokens: 4, temperature: 0.0}}}]"
)
SIZES = {
    "generate": [*ENGINE, "--sampling.max_new_tokens=40", "--shard_size=32"],
    "final_kl": ["--fabric.accelerator=cpu", "--fabric.devices=1", "--data.init_args.documents.tokens=9000",
                 "--data.init_args.batch_tokens=4096"],
    "library": ["--experts=[2,4]", "--windows=[64]"],
    "score": ["--fabric.accelerator=cpu", "--fabric.devices=1", "--data.init_args.documents.tokens=9000",
              "--data.init_args.batch_tokens=4096", f"--evaluations={FAR}"],
    "search": [f"--constraints.targets={TARGET}", "--constraints.sweep=null",
               "--constraints.limits.total_parameters=220000",
               "--costs.times=lit_puzzle.costs.roofline.Roofline"],
    "assemble": [],
    "distill": [*TRAIN, "--data.init_args.sequence_tokens=2048", "--data.init_args.validation_one_in=4"],
    "rl_recover": [*TRAIN, "--data.init_args.train_prompts=16", "--data.init_args.held_out_per_effort=4",
                   "--model.init_args.grpo={num_generations: 4, completions_per_device: 4, steps_per_generation: 1, "
                   "sampling: {max_new_tokens: 8}}",
                   "--model.init_args.evaluation={prompts_per_effort: 4, batch_size: 4, max_new_tokens: 8}"],
    "evaluate_parent": [*ENGINE, "--held_out.prompts_per_effort=4", "--sampling.max_new_tokens=8"],
    "evaluate": [*ENGINE, "--held_out.prompts_per_effort=4", "--sampling.max_new_tokens=8"],
    "calibrate_kv": [*CPU, "--data.init_args.sequence_tokens=2048", "--data.init_args.validation_one_in=4"],
    "export": [],
}  # fmt: skip
RUNS = Path("runs/gpt_oss_20b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A current folder in which the whole chain has been run."""
    made = tmp_path_factory.mktemp("chain")
    write_parent(made / "models" / "gpt-oss-20b")
    write_prompts(made / "prompts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        for name, words in SIZES.items():
            line = ["run", f"recipes/gpt_oss_20b/{name}.yaml", *words]
            patch.setattr("sys.argv", ["lightning", *line])  # which the record shows
            main(line)
    return made


@pytest.mark.slow
def test_prompts_have_the_date_of_the_recipe(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "gpt-oss-20b")
    shard = read_table(folder / RUNS / "generate" / "documents" / "shard-00000.parquet")
    text = tokenizer.decode(shard["input_ids"][0].as_py())
    assert "Current date: 2025-08-05" in text and re.search(r"Reasoning: (medium|high)", text)
    texts = [episode.texts for episode in read_episodes(folder / RUNS / "evaluate")]
    assert len(texts) == 3 * 4 * 8 and all(text and "Current date: 2025-08-05" in text.prompt for text in texts)


@pytest.mark.slow
def test_what_is_exported_is_the_plan_of_the_search(folder: Path) -> None:
    plan = Plan.load(folder / RUNS / "search" / "plan.json")
    exported = Checkpoint(folder / RUNS / "export" / "model")
    assert plan.parent_fingerprint == fingerprint(folder / "models" / "gpt-oss-20b")
    assert [count for count, _ in exported.blocks] == [block.num_experts for block in plan.blocks]
    assert [window for _, window in exported.blocks] == [block.window_tokens for block in plan.blocks]
    assert len(exported.mxfp4_layers) == len(plan.blocks)  # experts are still the parent's
    assert len({block.num_experts for block in plan.blocks}) > 1  # some were pruned
    assert 64 in {block.window_tokens for block in plan.blocks}


@pytest.mark.slow
def test_the_card_names_the_training_that_the_weights_went_through(folder: Path) -> None:
    card = (folder / RUNS / "export" / "model" / "README.md").read_text()
    training = card.split("## Training")[1].split("## Evaluation")[0]
    commands = re.findall(r"recipes/gpt_oss_20b/(\w+)\.yaml", training)
    assert commands == ["distill", "rl_recover"]
    evaluation = card.split("## Evaluation")[1].split("## Serving")[0]
    assert "of these weights before the export" in evaluation and "| | parent | recovered |" in evaluation


@pytest.mark.slow
def test_a_training_that_is_not_in_the_weights_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = ["run", "recipes/gpt_oss_20b/export.yaml", "--run_dir=runs/wrong", f"--checkpoint={RUNS}/assemble/child"]
    with pytest.raises(SystemExit):
        main([*words, "--kv_scales=null", f"--card.training=[{RUNS}/distill]"])
    said = capsys.readouterr().err
    assert f"names {RUNS}/distill, but" in said and "did not come from this run" in said


@pytest.mark.slow
def test_every_run_is_an_ancestor_of_what_is_exported(folder: Path) -> None:
    record = json.loads((folder / RUNS / "export" / "run.json").read_text())
    reached, waiting = {"export"}, [record]
    while waiting:
        for identity in waiting.pop()["inputs"].values():
            run = next((name for name in SIZES if f"{RUNS}/{name}" in f"{identity['path']}/"), None)
            if run is not None and run not in reached:
                reached.add(run)
                waiting.append(json.loads((folder / RUNS / run / "run.json").read_text()))
    assert reached == set(SIZES)
