"""The files and commands of docs/extending.md are run as printed, on the tiny model with less data."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.shown_commands import commands_in
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_puzzle.cli import main
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.library.candidates import library
from lit_puzzle.library.library import Library
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.run.folder import PACKAGE

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", flags=re.MULTILINE | re.DOTALL)
SECTIONS = {title: FENCE.findall(text) for title, text in SECTION.findall(PAGE.read_text())}
PARENT = PACKAGE / "assets" / "tiny_parent"
FEW = ["--data.init_args.prompts.num_prompts=6", "--data.init_args.sampling.max_new_tokens=8"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every file of the page, the recipes, a library and two plans; Python finds modules in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    main(["recipes", "--copy", "recipes"])
    for fences in SECTIONS.values():
        for _, title, text in fences:
            if title:
                (tmp_path / title).write_text(text)
    parent = Checkpoint(PARENT)
    scores = tuple(torch.arange(count, dtype=torch.float64) for count, _ in parent.blocks)
    (tmp_path / "runs" / "importance").mkdir(parents=True)
    Importance(parent.fingerprint(), "by_hand", 1, scores).save(tmp_path / "runs" / "importance")
    (tmp_path / "runs" / "library").mkdir()
    library(tmp_path / "runs" / "library", PARENT, tmp_path / "runs" / "importance", experts=[8], windows=[16])
    return tmp_path


def run_as_printed(project: Path, section: str, *cuts: str) -> None:
    """Run the one command of a section with less data, in a process of its own: training sets variables and ports."""
    (words,) = [words for language, _, text in SECTIONS[section] if language == "bash" for words in commands_in(text)]
    assert words[:4] == ["python", "-m", "lit_puzzle", "run"]
    subprocess.run([sys.executable, *words[1:], *cuts], check=True, cwd=project)


def results(folder: Path) -> dict[str, float]:
    values: dict[str, float] = json.loads((folder / "run.json").read_text())["results"]
    return values


def test_page_shows_the_seven_extension_points() -> None:
    scores = ["Importance score", "Combination of importance scores"]
    assert list(SECTIONS) == ["Reward", "Environment", *scores, "Candidate", "Evaluation", "Stage"]


@pytest.mark.slow
def test_reward(project: Path) -> None:
    cuts = [
        "--trainer.max_steps=1",
        "--model.init_args.grpo.sampling.max_new_tokens=32",
        "--trainer.val_check_interval=1",
    ]
    cuts += ["--model.init_args.evaluation.prompts_per_effort=4", "--data.init_args.held_out_per_effort=4"]
    cuts += ["--model.init_args.grpo.completions_per_device=16", "--data.init_args.train_prompts=2"]
    run_as_printed(project, "Reward", *cuts)
    (metrics,) = (project / "runs" / "short").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(metrics.open()) if row.get("train/rewards/short/mean")]
    for row in rows:  # no completion is longer than 32 tokens, so the mean reward follows from the mean length
        assert float(row["train/rewards/short/mean"]) == pytest.approx(1 - float(row["train/tokens"]) / 64)
    assert rows


@pytest.mark.slow
def test_environment(project: Path) -> None:
    run_as_printed(project, "Environment", "--held_out.prompts_per_effort=4", "--sampling.max_new_tokens=8")
    assert {f"accuracy/{effort}/sums" for effort in ("low", "medium", "high")} <= set(
        results(project / "runs" / "sums")
    )
    from my_environments import Sums  # type: ignore[import-not-found]

    assert (Sums().verify("1234", "1234"), Sums().verify("1234", "1235")) == (1.0, 0.0)


@pytest.mark.slow
def test_importance_score(project: Path) -> None:
    run_as_printed(project, "Importance score", *FEW)
    found = Importance.load(project / "runs" / "gate_mass")
    assert found.method == "gate_mass"
    for scores_E in found.scores:  # the gates of a token add up to 1
        assert float(scores_E.sum()) == pytest.approx(1.0)


def test_combination_of_importance_scores(project: Path) -> None:
    first = Importance.load(project / "runs" / "importance")  # 0, 1, 2, ... in every layer
    (project / "runs" / "gate_mass").mkdir()
    reversed_scores = tuple(scores_E.flip(0) for scores_E in first.scores)
    Importance(first.fingerprint, "gate_mass", 1, reversed_scores).save(project / "runs" / "gate_mass")
    run_as_printed(project, "Combination of importance scores")
    found = Importance.load(project / "runs" / "lowest_rank")
    assert found.method == "lowest_rank(by_hand, gate_mass)"
    assert found.scores[0].tolist() == [min(place, 15 - place) for place in range(16)]


def test_candidate(project: Path) -> None:
    run_as_printed(project, "Candidate")
    old, new = Library.load(project / "runs" / "library"), Library.load(project / "runs" / "library_24")
    assert [len(candidates) for candidates in new.layers] == [
        len(candidates) + (layer == 3) for layer, candidates in enumerate(old.layers)
    ]
    assert new.candidate(3, "window=24").block.window_tokens == 24


@pytest.mark.slow
def test_evaluation(project: Path) -> None:
    run_as_printed(project, "Evaluation", *FEW, "--scoring.rank_samples=2")
    entries = json.loads((project / "runs" / "score_last_token" / "scores.json").read_text())["entries"]
    windows = [entry for entry in entries if entry["candidate"].startswith("window=")]
    assert windows and all(-1 <= entry["metrics"]["last_token"]["mean"] <= 1 for entry in windows)
    (file,) = (project / "runs" / "score_last_token" / "evaluations").rglob("parent.json")
    tokenizer, model = AutoTokenizer.from_pretrained(PARENT), AutoModelForCausalLM.from_pretrained(PARENT)
    right = []
    for text in (" b=3 q=b value:q?3", " k=5 b=k value:b?5"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        right.append(float(model(ids).logits[0, -2].argmax() == ids[0, -1]))
    assert right in json.loads(file.read_text()).values()


def test_stage(project: Path) -> None:
    made = Library.load(project / "runs" / "library")
    for name, chosen in (("search", "parent"), ("greedy", "experts=8")):
        (project / "runs" / name).mkdir()
        made.plan([*["parent"] * 4, chosen, chosen]).save(project / "runs" / name / "plan.json")
    run_as_printed(project, "Stage")
    assert (project / "runs" / "compare" / "layers.txt").read_text() == "4\n5"
    assert results(project / "runs" / "compare") == {"different_layers": 2.0}
