"""The stage as a user runs it: right numbers, one = two processes, resumed after kill -9, bad input refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.recovery_runs import Fingerprint, forked
from helpers.streamed_runs import ENOUGH_GIB
from safetensors.torch import save_file
from transformers import GptOssForCausalLM

from lit_puzzle.cli import main
from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.evaluate.long_context import LongContextAccuracy
from lit_puzzle.evaluate.long_context_settings import LongContextProblems
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.library.candidates import library
from lit_puzzle.library.library import Library
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.scoring.scores import Scores
from lit_puzzle.scoring.scoring import score
from lit_puzzle.scoring.settings import Memory, ScoringSettings
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains
from lit_puzzle.training.fabric import FabricSettings

ROOT = Path(__file__).parents[2]
RANKED = ScoringSettings(rank_samples=4)
METRICS = {"hidden_mse", "hidden_cosine", "kl", "js", "lm_loss", "top1_disagreement", "mean_rank"}
FAR = {"far", *(f"far/{name}/{effort}" for name in ("tokens", "cut", "looping") for effort in ("low", "high"))}
PAIR = ("parent", "layer=1,window=4")


@pytest.fixture(scope="module")
def inputs(tiny_config, tmp_path_factory) -> Path:
    """A folder with `parent`, `library` and `sequences.jsonl`."""
    folder, tokenizer = tmp_path_factory.mktemp("inputs"), build_tokenizer()
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = GptOssForCausalLM(tiny_config(num_hidden_layers=3, max_position_embeddings=256, **special))
    model.save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    rows = tuple(torch.rand(8, generator=torch.Generator().manual_seed(layer)) for layer in range(3))
    (folder / "importance").mkdir()
    Importance(fingerprint(folder / "parent"), "hand", 1, rows).save(folder / "importance")
    (folder / "library").mkdir()
    library(folder / "library", folder / "parent", folder / "importance", experts=[4, 1], windows=[4, 300])
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(3, 128, (30 - 4 * i,), generator=generator).tolist() for i in range(6)]
    (folder / "sequences.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return folder


def write_recipe(folder: Path, inputs: Path, name: str, **changes: object) -> Path:
    """The packaged recipe made small."""
    content = {
        "base": str(ROOT / "recipes" / "score.yaml"),
        "run_dir": str(folder / name),
        "parent": str(inputs / "parent"),
        "library": str(inputs / "library"),
        "scoring": {"rank_samples": 4},
        "fabric": {"accelerator": "cpu"},
        "data": {"init_args": {"prompts": {"num_prompts": 7}, "sampling": {"max_new_tokens": 6}, "batch_size": 2}},
        "evaluations": [
            {
                "class_path": "lit_puzzle.evaluate.long_context.LongContextAccuracy",
                "init_args": {
                    "name": "far",
                    "problems": {
                        "environments": [{"class_path": "helpers.recovery_runs.Fingerprint"}],
                        "efforts": ["low", "high"],
                        "problems_per_effort": 3,
                    },
                    "sampling": {"max_new_tokens": 6, "temperature": 0.0},
                    "grading": {"answer_format": "whole"},
                },
            }
        ],
    }
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(content | changes))
    return recipe


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """A run of one process, not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    main(["run", str(write_recipe(folder, inputs, "run"))])
    return folder / "run"


def test_the_table_has_every_row_and_metric(whole, inputs):
    scores = Scores.load(whole)
    assert scores.parent_fingerprint == fingerprint(inputs / "parent") and scores.samples == 7
    lines = (whole / "calibration.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert scores.tokens == sum(len(row["input_ids"]) - row["prompt_tokens"] for row in rows)
    experts, windows = ["experts=4", "experts=1"], ["window=300", "window=4"]
    table = {(0, name) for name in [*experts, "window=4"]} | {(2, name) for name in [*experts, "window=4"]}
    table |= {(1, name) for name in experts + windows}
    assert set(scores.entries) == table
    for (layer, name), metrics in scores.entries.items():
        told = scores.could_tell[layer, name]
        if name == "window=300":  # longer than every sequence and item: no score, which is not a score of 0
            assert metrics == {} and told == {"tokens": 0.0, "far": 0.0}
            continue
        assert 0 < told["tokens"] <= 1 and told.get("far", 1.0) == 1.0
        assert set(metrics) == METRICS | (FAR if name.startswith("window") else set())
        assert metrics["kl"].mean > 1e-4 and metrics["kl"].standard_error > 0, (layer, name)
    assert scores.entries[1, "window=4"]["far"].standard_error > 0
    parent, child = (json.loads((whole / "evaluations" / "far" / f"{name}.json").read_text()) for name in PAIR)
    assert set(scores.parent) == FAR and scores.parent["far/tokens/high"] == sum(parent["tokens/high"]) / 3
    gained = sum(child["tokens/high"]) - sum(parent["tokens/high"])
    assert scores.entries[1, "window=4"]["far/tokens/high"].mean == pytest.approx(gained / 3)
    results = json.loads((whole / "run.json").read_text())["results"]
    assert results["rows"] == 10 and results["kl/max"] == max(row["kl"].mean for row in scores.entries.values() if row)
    assert results["not_measured"] == 1 and scores.longest == max(len(row["input_ids"]) for row in rows)


def run_in_child(words: list[str]) -> None:
    torch.set_num_threads(1)
    main(words)


@pytest.mark.parametrize("pattern", ["candidates/layer=1,experts=4.json", "evaluations/far/layer=0*", "inputs.json"])
@pytest.mark.slow
def test_a_killed_run_is_resumed_bit_for_bit(whole, inputs, tmp_path, pattern):
    words = ["run", str(write_recipe(tmp_path, inputs, "run"))]
    process = get_context("fork").Process(target=run_in_child, args=(words,))
    process.start()
    while not any((tmp_path / "run").glob(pattern)):
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "run" / "scores.json").exists()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("layer=*.json")}
    main(words)
    # an attempt without results starts anew
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed"] == bool(before)
    assert {file: file.stat().st_mtime_ns for file in before} == before  # nothing that was finished is done again
    for name in ("scores.json", "calibration.jsonl", "candidates/layer=2,window=4.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_two_launched_sharded_processes_agree_with_one(whole, inputs, tmp_path):
    """As a user starts them: layers in shards, hidden states in files, on the sequences of the other run."""
    recipe = write_recipe(tmp_path, inputs, "run")
    words = ["--fabric.devices=2", "--scoring.memory.hidden_gib=0"]
    words.append(f"--data.init_args.sequences={whole / 'calibration.jsonl'}")
    command = [sys.executable, "-m", "lit_puzzle", "run", str(recipe), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Starting with 2 processes" in done.stderr and done.stdout.count("1/10: layer 0") == 1
    assert not list((tmp_path / "run").glob("hidden_states*"))
    one, two = Scores.load(whole), Scores.load(tmp_path / "run")
    assert (one.samples, one.tokens, one.entries.keys()) == (two.samples, two.tokens, two.entries.keys())
    for row, metrics in one.entries.items():
        for name, measurement in metrics.items():
            found = two.entries[row][name]
            assert found.mean == pytest.approx(measurement.mean, rel=1e-5, abs=1e-6), (row, name)
            assert found.standard_error == pytest.approx(measurement.standard_error, rel=1e-4, abs=1e-6), (row, name)


def small_data(inputs: Path, **changes: Any) -> CalibrationData:
    return CalibrationData(**{"parent": inputs / "parent", "sequences": inputs / "sequences.jsonl", **changes})


def test_trained_weights_are_scored(inputs, tmp_path):
    """The same cut with the parent's own rows as `weights` gives the same scores; with other rows others."""
    plain = tmp_path / "plain"
    plain.mkdir()
    score(plain, inputs / "parent", inputs / "library", small_data(inputs), scoring=RANKED)
    made = Library.load(inputs / "library")
    layer = GptOssForCausalLM.from_pretrained(inputs / "parent").model.layers[1]
    kept = list(made.candidate(1, "experts=4").block.experts)
    rows = {
        name: layer.get_parameter(name)[kept].detach() for name in ("mlp.router.weight", "mlp.experts.gate_up_proj")
    }
    found = {}
    for name, factor in (("same", 1.0), ("other", 1.5)):
        folder = tmp_path / name
        folder.mkdir()
        save_file({key: (factor * tensor).contiguous() for key, tensor in rows.items()}, folder / "a.safetensors")
        data = made.to_json()
        entry = next(candidate for candidate in data["layers"][1] if candidate["name"] == "experts=4")
        entry["weights"] = "a.safetensors"
        Library.from_json(data).save(folder)
        score(tmp_path / name, inputs / "parent", folder, small_data(inputs), scoring=RANKED)
        found[name] = Scores.load(folder)
    expected = Scores.load(plain)
    assert found["same"] == expected
    assert found["other"].entries[1, "experts=4"]["kl"] != expected.entries[1, "experts=4"]["kl"]
    assert found["other"].entries[2, "experts=4"]["kl"] == expected.entries[2, "experts=4"]["kl"]


def test_pairs_and_evaluation_of_all_rows(inputs, tmp_path):
    problems = LongContextProblems(environments=[Fingerprint()], efforts=["low"], problems_per_effort=2)
    task = LongContextAccuracy(problems, sampling=Sampling(3, 0.0), name="far")
    score(
        tmp_path, inputs / "parent", inputs / "library", small_data(inputs), evaluations=[task],
        scoring=ScoringSettings(pairs=True, evaluate="all", memory=Memory(log_probs_gib=0)),
    )  # fmt: skip
    entries = Scores.load(tmp_path).entries
    made = Library.load(inputs / "library")
    assert set(entries) == {(layer, c.name) for layer, row in enumerate(made.layers) for c in row[1:]}
    assert all("far" in metrics for key, metrics in entries.items() if key != (1, "window=300"))
    assert entries[1, "window=300"] == {}  # no sequence and no item is longer
    assert entries[1, "experts=1,window=4"]["kl"].mean > entries[1, "experts=1"]["kl"].mean


@pytest.mark.slow
def test_an_engine_gives_the_scores_of_the_model_in_memory(inputs, tmp_path):
    """Also where the parent is read layer by layer, and resumed after a kill between candidates."""
    problems = LongContextProblems(environments=[Fingerprint()], efforts=["low"], problems_per_effort=4)
    run, found = (inputs / "parent", inputs / "library", small_data(inputs)), {}
    for name, engine, fabric in (
        ("memory", None, FabricSettings()),
        ("engine", EngineSettings("transformers", batch_size=4), FabricSettings(memory_gib=ENOUGH_GIB)),
    ):
        (tmp_path / name).mkdir()
        task = LongContextAccuracy(problems, sampling=Sampling(3, 0.0), name="far", engine=engine)
        score(tmp_path / name, *run, evaluations=[task], fabric=fabric)
        found[name] = {file.name: json.loads(file.read_text()) for file in (tmp_path / name).glob("evaluations/far/*")}
    assert found["engine"] == found["memory"] and len(found["memory"]) > 2
    gone = next(path for path in (tmp_path / "engine").glob("evaluations/far/layer*") if "score" in path.read_text())
    before = gone.read_text()
    gone.unlink()
    score(tmp_path / "engine", *run, evaluations=[task], fabric=fabric)
    assert gone.read_text() == before and not (tmp_path / "engine" / "candidate").exists()


def test_prompts_are_scored_on_request(whole, inputs, tmp_path):
    """Where the data does not say which tokens are the prompt's, all are scored anyway."""
    with_prompts, silent = small_data(inputs, sequences=whole / "calibration.jsonl"), tmp_path / "silent.jsonl"
    rows = [json.loads(line)["input_ids"] for line in (whole / "calibration.jsonl").read_text().splitlines()]
    silent.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    found = []
    for name, data, score_prompts in (
        ("prompts", with_prompts, True),
        ("silent", small_data(inputs, sequences=silent), False),
    ):
        (tmp_path / name).mkdir()
        settings = ScoringSettings(score_prompts=score_prompts)
        score(tmp_path / name, inputs / "parent", inputs / "library", data, scoring=settings)
        found.append(Scores.load(tmp_path / name))
    assert found[0] == found[1] and found[0].tokens == sum(len(row) for row in rows)
    assert found[0].entries[1, "window=4"]["kl"] != Scores.load(whole).entries[1, "window=4"]["kl"]


def test_bad_input_is_refused_before_anything_slow(inputs, tmp_path, tiny_model):
    run = partial(score, tmp_path, inputs / "parent", inputs / "library")
    problems = LongContextProblems(environments=[Chains()], efforts=["low"])
    data, task = small_data(inputs), LongContextAccuracy(problems, name="kl")
    other = tmp_path / "other"
    tiny_model.save_pretrained(other)
    refused: dict[str, Callable[[], object]] = {
        "of parent .*, not of": partial(score, tmp_path, other, inputs / "library", small_data(inputs, parent=other)),
        "name the same folder": partial(run, small_data(inputs, parent=other)),
        "be none of": partial(run, data, evaluations=[task]),
        "rank_samples must be 1 or more": partial(ScoringSettings, rank_samples=0),
        "block library .* does not exist": partial(score, tmp_path, inputs / "parent", tmp_path / "no", data),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    lines = {
        "a standard error needs two": [[5, 6]],
        "has 257 tokens; the parent's context holds 256": [[5] * 257, [5, 6]],
    }
    for message, rows in lines.items():
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        (tmp_path / "inputs.json").unlink(missing_ok=True)  # as the door does after a refusal
        with pytest.raises(ValueError, match=message):
            run(small_data(inputs, sequences=tmp_path / "rows.jsonl"))
    for prompt, message in (
        (2, r"jsonl:1: the sequence has 2 tokens, prompt_tokens is 2"),
        ("x", "must be a whole number"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [5, 6], "prompt_tokens": prompt}) + "\n")
        (tmp_path / "inputs.json").unlink()
        with pytest.raises(ValueError, match=message):
            run(small_data(inputs, sequences=tmp_path / "rows.jsonl"))
    assert not list(tmp_path.glob("candidates*"))


class Broken:
    """An evaluation with a number of items, or with a score, that is not allowed."""

    name = "broken"

    def __init__(self, items: int, score: float) -> None:
        self.size, self.score, self.calls = items, score, 0

    def items(self, tokenizer: object) -> list[int]:
        return list(range(self.size))

    def scores(self, policy: object, tokenizer: object, items: list[int]) -> list[float]:
        self.calls += 1
        return [self.score] * len(items)


def test_a_broken_evaluation_shows_before_any_block_is_scored(inputs, tmp_path):
    problems = LongContextProblems(environments=[Fingerprint()], efforts=["low"])
    far = LongContextAccuracy(problems, sampling=Sampling(10**6), name="far")
    refused: dict[str, list[Any]] = {
        "'broken' has 1 items": [Broken(1, 0.5)],
        "'broken' gave 3 scores for 3 items, from 1.5 to 1.5": [Broken(3, 0.5), Broken(3, 1.5)],
        "'far': a prompt with its completion has .* the model's context holds 256": [far],
    }
    for message, tasks in refused.items():
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        tasks[0].name = "first" if len(tasks) > 1 else tasks[0].name
        with pytest.raises(ValueError, match=message):
            score(folder, inputs / "parent", inputs / "library", small_data(inputs), evaluations=tasks)
        assert not (folder / "candidates").exists()
        claimed = json.loads((folder / "inputs.json").read_text())["inputs"]
        assert "parent" in claimed and ("sequences" in claimed) == ("gave" in message)  # items are checked first
    assert (tmp_path / "1" / "evaluations" / "first" / "parent.json").is_file()


def test_finished_evaluations_are_not_run_again(inputs, tmp_path):
    task, windows = Broken(3, 0.5), 4
    run = partial(score, tmp_path, inputs / "parent", inputs / "library", small_data(inputs), evaluations=[task])
    run()
    assert task.calls == 1 + windows
    (tmp_path / "evaluations" / "broken" / "layer=2,window=4.json").unlink()
    (tmp_path / "candidates" / "layer=2,window=4.json").unlink()
    run()
    assert task.calls == 1 + windows + 1
    run()
    assert task.calls == 1 + windows + 1


def test_an_overflow_is_named(inputs, tmp_path):
    model = GptOssForCausalLM.from_pretrained(inputs / "parent")
    folder = tmp_path / "library"
    folder.mkdir()
    made = Library.load(inputs / "library").to_json()
    entry = next(candidate for candidate in made["layers"][1] if candidate["name"] == "window=4")
    entry["weights"] = "a.safetensors"
    projection = model.model.layers[1].self_attn.o_proj.weight.detach()
    save_file({"self_attn.o_proj.weight": torch.full_like(projection, 3e38)}, folder / "a.safetensors")
    Library.from_json(made).save(folder)
    with pytest.raises(ValueError, match=r"layer 1, candidate 'window=4': hidden_mse of sample 0 is (nan|inf)"):
        score(tmp_path, inputs / "parent", folder, small_data(inputs))
    assert (tmp_path / "candidates" / "layer=1,experts=4.json").is_file()
    assert not (tmp_path / "candidates" / "layer=1,window=4.json").exists()


def two_of(recipe: Path, rank: int) -> None:
    main(["run", str(recipe), "--fabric.devices=2", "--fabric.strategy=replicated"])


@pytest.mark.slow
def test_processes_started_from_outside_join_the_run(whole, inputs, tmp_path):
    recipe = write_recipe(tmp_path, inputs, "run")
    assert forked(2, partial(two_of, recipe)) == [0, 0]
    one, two = Scores.load(whole), Scores.load(tmp_path / "run")
    assert two.entries[1, "window=4"]["kl"].mean == pytest.approx(one.entries[1, "window=4"]["kl"].mean, rel=1e-5)
