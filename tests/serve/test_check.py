"""The serving check: results equal to the reference pass, each kind of wrong result fails its check."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.vllm_folders import write_folder
from safetensors.torch import load_file, save_file

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.loading import load_model
from lit_puzzle.serve.vllm.check import plan_engines, require_vllm, run_engines, serve_check, why_no_server
from lit_puzzle.serve.vllm.check_reference import Reference, make_reference, permute_experts, reverse_experts, score_all
from lit_puzzle.serve.vllm.comparisons import allowed_difference, compare, compare_allocation
from lit_puzzle.serve.vllm.report import difference, write_report
from lit_puzzle.serve.vllm.settings import CheckPrompts, VLLMSettings

Results = dict[str, list[Any]]
Logprobs = list[list[float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("served") / "folder", scales=True)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return make_reference(folder, "float32", CheckPrompts(2, 32, 4), seed=0, measure_rounding=True)


def shifted(logprobs: Logprobs, by: float) -> Logprobs:
    return [[*row[:-1], row[-1] + by] for row in logprobs]


def right_results(reference: Reference) -> Results:
    """Results of an engine that computes as transformers does, with an FP8 cache of small quality loss."""
    logprobs, ends = reference.logprobs, reference.end_ids
    stops = [{"ids": [end], "finish_reason": "stop", "stop_reason": None} for end in ends]
    stops.append({"ids": [reference.plain_id] * 4, "finish_reason": "length", "stop_reason": None})
    main = [
        reference.completions,
        logprobs,
        None,
        shifted(logprobs, 1.0),
        None,
        logprobs,
        *stops,
        {"tokens": 1600, "block": 16, "version": "1"},
    ]
    fp8 = [{"tokens": 3216, "block": 16}, shifted(logprobs, 0.1), None, shifted(logprobs, 0.6)]
    return {"main": main, "window": [shifted(logprobs, 0.5)], "bfloat16": [{"tokens": 1600, "block": 16}], "fp8": fp8}


def failed(reference: Reference, results: Results) -> set[str]:
    checks = compare(reference, results, exact=True, tolerance=1e-4)
    assert "skipped" not in {check.outcome for check in checks}
    return {check.name for check in checks if check.outcome == "failed"}


def test_right_results_pass(reference: Reference) -> None:
    assert failed(reference, right_results(reference)) == set()


WRONG: dict[str, tuple[str, int, Any]] = {
    "greedy_tokens": ("main", 0, lambda rows: [[*rows[0][:-1], rows[0][-1] + 1], *rows[1:]]),
    "log_probabilities": ("main", 1, lambda logprobs: shifted(logprobs, 2e-4)),
    "control_experts": ("main", 3, lambda logprobs: shifted(logprobs, -1.0)),  # equal to the reference
    "reload": ("main", 5, lambda logprobs: shifted(logprobs, 1e-5)),
    "stop_tokens": ("main", 6, lambda stop: stop | {"ids": stop["ids"] * 4, "finish_reason": "length"}),
    "control_window": ("window", 0, lambda logprobs: shifted(logprobs, -0.5)),
    "kv_tokens": ("fp8", 0, lambda capacity: capacity | {"tokens": 3232}),
    "control_scales": ("fp8", 3, lambda logprobs: shifted(logprobs, -0.5)),  # equal to those with scales
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_fail_their_check(reference: Reference, name: str) -> None:
    engine, step, change = WRONG[name]
    results = right_results(reference)
    results[engine][step] = change(results[engine][step])
    found = failed(reference, results)
    assert name in found and found <= {name, "reload"}  # a reload is compared with the scores before it


def test_engines_run_the_steps_that_are_compared(folder: Path, reference: Reference) -> None:
    engines = plan_engines(Checkpoint(folder), reference, {"max_model_len": 64}, 32)
    steps = {name: [step["do"] for step in engine["steps"]] for name, engine in engines.items()}
    ends = ["forced"] * (len(reference.end_ids) + 1)
    reloads = ["score", "reload", "score", "reload", "score"]
    assert steps == {
        "main": ["greedy", *reloads, *ends, "capacity"],
        "window": ["score"],
        "bfloat16": ["capacity"],
        "fp8": ["capacity", "score", "reload", "score"],
    }
    blocks = engines["window"]["settings"]["hf_overrides"]["block_configs"]
    assert [block["sliding_window"] for block in blocks] == [None, 25, 40, None]


def test_in_float32_rounding_is_measured_on_equal_ways(folder: Path, reference: Reference) -> None:
    """The model is left as it was; a model that rounds more is allowed more, down to the rounding of a logarithm."""
    silent = make_reference(folder, "float32", CheckPrompts(2, 32, 4), seed=0)
    assert silent == replace(reference, rounding=None) and reference.exact_logprobs is None
    assert reference.rounding is not None and 0 < reference.rounding < 1e-5
    rough = replace(reference, rounding=1e-3)
    allowed, metrics = allowed_difference(rough, True, None)
    assert allowed == pytest.approx(4e-3) and metrics == {"rounding": 1e-3}
    assert allowed_difference(replace(reference, rounding=0.0), True, None)[0] == 2e-5
    with pytest.raises(ValueError, match="the rounding that it follows from was not measured"):
        allowed_difference(silent, True, None)
    model = load_model(folder, "float32")
    with torch.inference_mode():
        first = score_all(model, reference.sequences)
        reverse_experts(model)
        assert difference(score_all(model, reference.sequences), first)[0] < 1e-5
        permute_experts(model, 1)
        assert difference(score_all(model, reference.sequences), first)[0] > 1e-3


def test_failed_checks_are_reported(reference: Reference, tmp_path: Path) -> None:
    results = right_results(reference)
    results["main"][1] = shifted(reference.logprobs, 0.5)
    checks = compare(reference, results, exact=True, tolerance=1e-4)
    metrics = write_report(tmp_path / "report.json", checks, {"vllm": "1"})
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"] and metrics["failed"] + metrics["skipped"] == 4  # controls too, if they can show
    assert metrics["passed"] == len(checks) - 4
    assert metrics["log_probabilities/difference"] == pytest.approx(0.5)
    first = {"name": "greedy_tokens", "outcome": "passed", "metrics": {"equal": 8, "tokens": 8}}
    assert report["checks"][0] == first | {"reason": "8 of 8 equal those of transformers"}


def test_missing_environments_and_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no interpreter '.*nowhere' of a vLLM environment\. .*vllm_env\.sh"):
        require_vllm(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="lacks vllm or the plugin"):
        require_vllm(Path(sys.executable))
    with pytest.raises(ValueError, match="must be positive"):
        CheckPrompts(count=0)
    with pytest.raises(ValueError, match=r"kv_cache_gib 0\.0 and server_seconds 600\.0 were given; both must be"):
        VLLMSettings(kv_cache_gib=0.0)
    with pytest.raises(ValueError, match=r"ended with code 1; the end of .*vllm\.log:\n(.|\n)*No module named"):
        run_engines(tmp_path, Path(sys.executable), [{"model": "x", "settings": {}, "steps": []}])


def outcome(reference: Reference, results: Results, name: str, exact: bool = True) -> str:
    checks = compare(reference, results, exact, None)
    return next(check.outcome for check in checks if check.name == name)


def test_one_block_more_or_less_is_twice_the_tokens(reference: Reference) -> None:
    results = right_results(reference)
    for tokens, expected in ((3184, "passed"), (3200, "passed"), (3216, "passed"), (3168, "failed"), (1600, "failed")):
        results["fp8"][0] = {"tokens": tokens, "block": 16}
        assert outcome(reference, results, "kv_tokens") == expected, tokens


def test_a_control_that_cannot_show_is_skipped(reference: Reference) -> None:
    """Where the router chooses all experts alike, transformers does not notice permuted experts either."""
    results = right_results(reference)
    results["main"][3] = reference.logprobs
    assert outcome(reference, results, "control_experts") == "failed"
    blind = replace(reference, permuted_change=(1e-7, 1e-8))
    assert outcome(blind, results, "control_experts") == "skipped"
    assert outcome(blind, right_results(reference), "log_probabilities") == "passed"


def test_an_engine_of_vllms_own_model_that_keeps_its_experts_is_not_tested_by_a_reload(reference: Reference) -> None:
    """vLLM 0.32 copies the experts of a stock gpt-oss past its own loaders, so a reload changes none."""
    results = right_results(reference)
    results["main"][3] = results["main"][1]
    for is_child, expected in ((True, "failed"), (False, "skipped")):
        checks = {check.name: check for check in compare(reference, results, True, 1e-4, is_child)}
        assert checks["control_experts"].outcome == expected
    assert checks["reload"].outcome == "skipped" and "keeps its experts" in checks["reload"].reason
    taken = {check.name: check.outcome for check in compare(reference, right_results(reference), True, 1e-4, False)}
    assert taken["control_experts"] == taken["reload"] == "passed"


def test_permuted_experts_change_what_the_router_tells_apart(folder: Path, tmp_path: Path) -> None:
    """The control is computed with transformers: nothing changes where all experts are chosen with equal weights."""
    assert make_reference(folder, "float32", CheckPrompts(2, 32, 4), seed=0).permuted_change[0] > 1e-2
    alike = write_folder(tmp_path / "alike", scales=False)
    tensors = load_file(alike / "model.safetensors")
    config = json.loads((alike / "config.json").read_text())
    routers = {name: torch.zeros_like(t) for name, t in tensors.items() if ".router." in name}
    experts = max(block["num_local_experts"] for block in config["block_configs"])
    (alike / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": experts}))
    save_file(tensors | routers, alike / "model.safetensors", {"format": "pt"})
    largest, _ = make_reference(alike, "float32", CheckPrompts(2, 32, 4), seed=0).permuted_change
    assert largest < 1e-4


def test_bfloat16_is_judged_by_the_rounding_of_transformers(folder: Path) -> None:
    reference = make_reference(folder, "bfloat16", CheckPrompts(2, 32, 4), seed=0, measure_rounding=True)
    exact = reference.exact_logprobs
    assert exact is not None
    allowed, metrics = allowed_difference(reference, False, None)
    assert allowed == 2 * metrics["rounding"] > 0
    assert metrics["rounding"] == pytest.approx(difference(reference.logprobs, exact)[1])

    def judged(by: float) -> str:
        results = right_results(reference)
        results["main"][1] = [[value + by for value in row] for row in exact]
        return outcome(reference, results, "log_probabilities", exact=False)

    assert judged(0.9 * allowed) == "passed" and judged(1.1 * allowed) == "failed"
    with pytest.raises(ValueError, match="the rounding that it follows from was not"):
        allowed_difference(replace(reference, exact_logprobs=None), False, None)
    assert allowed_difference(replace(reference, exact_logprobs=None), False, 0.3) == (0.3, {})


def test_a_control_that_rounding_hides_is_skipped_and_one_without_effect_fails(reference: Reference) -> None:
    coarse = replace(reference, exact_logprobs=[[value + 0.1 for value in row] for row in reference.logprobs])
    results = right_results(reference)
    results["window"] = [[[value + 0.05 for value in row] for row in reference.logprobs]]
    assert outcome(coarse, results, "control_window", exact=False) == "skipped"
    results["window"] = [reference.logprobs]
    assert outcome(coarse, results, "control_window", exact=False) == "failed"
    results["window"] = [[[value + 1.0 for value in row] for row in reference.logprobs]]
    assert outcome(coarse, results, "control_window", exact=False) == "passed"


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_tolerances_that_judge_nothing_are_refused(folder: Path, tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"tolerance=.* was given; it must be positive and finite"):
        serve_check(tmp_path, folder, tolerance=tolerance)


def test_the_predicted_capacity_is_compared_with_the_engines() -> None:
    """12 layers in 4 / 2 / 6: groups of 2; 2048 blocks of 128 tokens in 256 MiB are what vLLM 0.32 made of them."""
    windows = [128, None] * 4 + [128, 96] * 2
    stated = {"version": "0.32.0", "blocks": 2048, "requests": 20.48, "block": 128, "length": 2048, "in_flight": 4096}
    check = compare_allocation(stated, windows, 2 * 2 * 64 * 2, 2**28)
    assert check.outcome == "passed" and check.metrics["padding"] == 0
    assert check.metrics["predicted"] == pytest.approx(20.48, rel=1e-3)
    assert compare_allocation(stated | {"blocks": 2100}, windows, 512, 2**28).outcome == "failed"
    assert compare_allocation(stated | {"version": "0.13.0"}, windows, 512, 2**28).outcome == "skipped"


def test_a_stock_folder_with_another_vocabulary_is_not_served_by_chat(folder: Path, reference: Reference) -> None:
    """vLLM renders chats of every stock gpt_oss folder as gpt-oss writes them; children keep their template."""
    child, settings = Checkpoint(folder), VLLMSettings(Path("python"))
    with_chat = replace(reference, chats={"none": [1]})
    assert why_no_server(child, settings, with_chat) is None
    assert why_no_server(child, replace(settings, server=False), with_chat) == "vllm.server: false"
    assert why_no_server(child, settings, replace(reference, chats={})) == "the folder has no chat template"
    stock = Checkpoint(folder)
    stock.config = {**stock.config, "model_type": "gpt_oss"}
    assert "this one has 128 tokens" in str(why_no_server(stock, settings, with_chat))
    stock.config["vocab_size"] = 201_088
    assert why_no_server(stock, settings, with_chat) is None
