"""The verdict on what an engine answered: right answers pass, each kind of wrong answer fails its check."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.vllm_folders import write_folder

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.serve.vllm.check import judge, plan_engines, require_vllm, run_engines, serve_check
from lit_puzzle.serve.vllm.check_reference import Reference, make_reference
from lit_puzzle.serve.vllm.report import write_report

Answers = dict[str, list[Any]]
Scores = list[list[float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("served") / "folder", scales=True)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return make_reference(folder, "float32", 2, 32, 4, "What is 2 + 3?", seed=0)


def shifted(scores: Scores, by: float) -> Scores:
    return [[*row[:-1], row[-1] + by] for row in scores]


def right_answers(reference: Reference) -> Answers:
    """What an engine that computes as transformers does would answer, with an FP8 cache that costs a little."""
    scores, ends = reference.scores, reference.end_ids
    stops = [{"ids": [end], "finish_reason": "stop", "stop_reason": None} for end in ends]
    stops.append({"ids": [reference.plain_id] * 4, "finish_reason": "length", "stop_reason": None})
    main = [
        reference.answers,
        scores,
        None,
        shifted(scores, 1.0),
        None,
        scores,
        *stops,
        {"tokens": 100, "version": "1"},
    ]
    fp8 = [{"tokens": 200}, shifted(scores, 0.1), None, shifted(scores, 0.6)]
    return {"main": main, "window": [shifted(scores, 0.5)], "bfloat16": [{"tokens": 100}], "fp8": fp8}


def failed(folder: Path, reference: Reference, answers: Answers) -> set[str]:
    checks = judge(Checkpoint(folder), reference, answers, exact=True, limit=1e-4)
    assert "skipped" not in {check.outcome for check in checks}
    return {check.name for check in checks if check.outcome == "failed"}


def test_right_answers_pass(folder: Path, reference: Reference) -> None:
    assert failed(folder, reference, right_answers(reference)) == set()


WRONG: dict[str, tuple[str, int, Any]] = {
    "greedy_tokens": ("main", 0, lambda rows: [[*rows[0][:-1], rows[0][-1] + 1], *rows[1:]]),
    "log_probabilities": ("main", 1, lambda scores: shifted(scores, 2e-4)),
    "control_experts": ("main", 3, lambda scores: shifted(scores, -1.0)),  # back to the right ones: nothing noticed
    "reload": ("main", 5, lambda scores: shifted(scores, 1e-5)),
    "stop_tokens": ("main", 6, lambda stop: stop | {"ids": stop["ids"] * 4, "finish_reason": "length"}),
    "control_window": ("window", 0, lambda scores: shifted(scores, -0.5)),
    "kv_tokens": ("fp8", 0, lambda capacity: {"tokens": 150}),
    "control_scales": ("fp8", 3, lambda scores: shifted(scores, -0.5)),  # as with scales: they are not used
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_fail_their_check(folder: Path, reference: Reference, name: str) -> None:
    engine, step, change = WRONG[name]
    answers = right_answers(reference)
    answers[engine][step] = change(answers[engine][step])
    found = failed(folder, reference, answers)
    assert name in found and found <= {name, "reload"}  # a reload is compared with the scores before it


def test_engines_are_asked_what_is_judged(folder: Path, reference: Reference) -> None:
    engines = plan_engines(Checkpoint(folder), reference, {"max_model_len": 64}, 32)
    pairs = {name: [step["do"] for step in engine["steps"]] for name, engine in engines.items()}
    ends = ["forced"] * (len(reference.end_ids) + 1)
    reloads = ["score", "reload", "score", "reload", "score"]
    assert pairs == {
        "main": ["greedy", *reloads, *ends, "capacity"],
        "window": ["score"],
        "bfloat16": ["capacity"],
        "fp8": ["capacity", "score", "reload", "score"],
    }
    blocks = engines["window"]["settings"]["hf_overrides"]["block_configs"]
    assert [block["sliding_window"] for block in blocks] == [None, 25, 40, None]


def test_failed_checks_are_on_disk(folder: Path, reference: Reference, tmp_path: Path) -> None:
    answers = right_answers(reference)
    answers["main"][1] = shifted(reference.scores, 0.5)
    checks = judge(Checkpoint(folder), reference, answers, exact=True, limit=1e-4)
    results = write_report(tmp_path / "report.json", checks, {"vllm": "1"})
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"] and results["failed"] == 4 and results["passed"] == len(checks) - 4  # controls too
    assert results["log_probabilities/difference"] == pytest.approx(0.5)


def test_what_cannot_be_checked_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no interpreter '.*nowhere' of a vLLM environment\. .*vllm_env\.sh"):
        require_vllm(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="lacks vllm or the plugin"):
        require_vllm(Path(sys.executable))
    with pytest.raises(ValueError, match="must be positive"):
        serve_check(tmp_path, folder, prompts=0)
    with pytest.raises(ValueError, match=r"ended with code 1; the end of .*vllm\.log:\n(.|\n)*No module named"):
        run_engines(tmp_path, Path(sys.executable), [{"model": "x", "settings": {}, "steps": []}])
