"""timed_blocks.py: exact on tables that are linear on every axis, errors outside the measured range, no torch."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Block, Deployment, KernelTimes, Setting
from lit_puzzle.costs.timed_blocks import TimedBlocks, shape_fingerprint
from lit_puzzle.spec import Scenario

SHAPE = ModelShape.from_config(
    {
        "model_type": "gpt_oss",
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 128,
        "num_experts_per_tok": 2,
    }
)
SCENARIO = Scenario("cpu", 1, 40, 60, 8, "float32", 1, 1, "float32", "float32")
SETTING = Setting(SHAPE, SCENARIO, Deployment(1, 1, 1), ServingEngine())
EXPERTS, BATCHES, CONTEXTS, PROMPTS = (8, 12, 16), (1, 8, 32), (20, 64, 128), (16, 64)


def decode(experts: float, batch: float, context: float) -> float:
    """Multilinear, with every cross term."""
    return 1e-6 * (3 + experts) * (5 + 2 * batch) * (7 + 0.25 * context)


def prefill(experts: float, prompt: float) -> float:
    return 1e-6 * (11 + experts) * (2 + prompt)


def a_table() -> dict[str, Any]:
    decodes, prefills = [], []
    for window, experts in product((None, 16), EXPERTS):
        block = {"window_tokens": window, "num_experts": experts}
        for batch, context in product(BATCHES, CONTEXTS if window is None else (16,)):
            seconds = decode(experts, batch, context)
            decodes.append(block | {"batch_size": batch, "context_tokens": context, "seconds": seconds})
        for prompt in PROMPTS:
            prefills.append(block | {"prompt_tokens": prompt, "seconds": prefill(experts, prompt)})
    return {
        "gpu": "cpu",
        "dtype": "float32",
        "model": SHAPE.to_json(),
        "fingerprint": shape_fingerprint(SHAPE),
        "command": "python scripts/measure_blocks.py --config c.json --experts 8 12 16 --windows none 16 "
        "--batches 1 8 32 --contexts 20 64 128 --prompts 16 64 --out t.json",
        "hardware": {},
        "versions": {},
        "settings": {},
        "decode_layer": decodes,
        "prefill_layer": prefills,
        "decode_rest": [{"batch_size": batch, "seconds": 1e-4 * (1 + batch)} for batch in BATCHES],
        "prefill_rest": [{"prompt_tokens": prompt, "seconds": 1e-5 * prompt} for prompt in PROMPTS],
        "whole_model": [],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def to_file(table: dict[str, Any]) -> Path:
        (tmp_path / "table.json").write_text(json.dumps(table))
        return tmp_path / "table.json"

    return to_file


@pytest.fixture
def times(write: Callable[[dict[str, Any]], Path]) -> TimedBlocks:
    return TimedBlocks(write(a_table()))


@pytest.mark.parametrize("experts", [8, 9, 12, 15, 16])
@pytest.mark.parametrize("batch", [1, 5, 8, 31, 32])
@pytest.mark.parametrize("context", [20, 20.5, 64, 100.25, 128])
def test_between_measured_points_seconds_are_linear(
    times: TimedBlocks, experts: int, batch: int, context: float
) -> None:
    seconds = times.decode_layer(SETTING, Block(experts, None), batch, context)
    assert seconds == pytest.approx(decode(experts, batch, context), rel=1e-12)
    assert times.decode_rest(SETTING, batch) == pytest.approx(1e-4 * (1 + batch), rel=1e-12)


@pytest.mark.parametrize("prompt", [16, 17, 40, 64])
def test_reading_a_prompt_is_linear_between_measured_lengths(times: TimedBlocks, prompt: int) -> None:
    assert times.prefill_layer(SETTING, Block(10, 16), prompt) == pytest.approx(prefill(10, prompt), rel=1e-12)
    assert times.prefill_rest(SETTING, prompt) == pytest.approx(1e-5 * prompt, rel=1e-12)


def test_beyond_its_window_a_context_costs_what_the_window_does(times: TimedBlocks) -> None:
    at_window = times.decode_layer(SETTING, Block(12, 16), 8, 16)
    assert at_window == pytest.approx(decode(12, 8, 16))
    assert times.decode_layer(SETTING, Block(12, 16), 8, 100_000) == at_window


def test_a_measured_point_is_returned_as_it_is(times: TimedBlocks) -> None:
    for row in a_table()["decode_layer"]:
        block = Block(row["num_experts"], row["window_tokens"])
        assert times.decode_layer(SETTING, block, row["batch_size"], row["context_tokens"]) == row["seconds"]


FULL, WINDOWED = Block(8, None), Block(8, 16)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda t: t.decode_layer(SETTING, Block(17, None), 8, 64), "num_experts 8 to 16, not for 17.* 8 12 16 17 --w"),
        (lambda t: t.decode_layer(SETTING, Block(7, None), 8, 64), "num_experts 8 to 16, not for 7.* 8 12 16 7 --w"),
        (lambda t: t.decode_layer(SETTING, FULL, 33, 64), "batch_size 1 to 32, not for 33. .* --batches 1 8 32 33 --c"),
        (lambda t: t.decode_layer(SETTING, FULL, 33, 64), "or set costs.engine.max_sequences to 32"),
        (
            lambda t: t.decode_layer(SETTING, FULL, 8, 128.5),
            "none.*context_tokens 20 to 128, not for 128.5.* 128 129 --p",
        ),
        (lambda t: t.decode_layer(SETTING, FULL, 8, 19), "not for 19.*--contexts 20 64 128 19 --prompts 16 64 --out t"),
        (lambda t: t.decode_layer(SETTING, WINDOWED, 8, 12), "window 16.* context_tokens 16 to 16, not for 12"),
        (
            lambda t: t.decode_layer(SETTING, Block(8, 24), 8, 64),
            "'none', '16'.*, not for 24.*--windows none 16 24 --b",
        ),
        (lambda t: t.prefill_layer(SETTING, FULL, 65), "prompt_tokens 16 to 64, not for 65.*--prompts 16 64 65 --out"),
        (lambda t: t.decode_rest(SETTING, 0), "decode_rest.*batch_size 1 to 32, not for 0"),
        (lambda t: t.prefill_rest(SETTING, 15), "prompt_tokens 16 to 64, not for 15"),
    ],
)
def test_outside_the_measured_range_is_an_error_that_says_how_to_extend_it(
    times: TimedBlocks, ask: Callable[[TimedBlocks], float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(times)


def _in(**changes: Any) -> Setting:
    return replace(SETTING, scenario=replace(SCENARIO, **changes))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (replace(SETTING, model=replace(SHAPE, hidden=128)), r"shape; \(timed, given\): \{'hidden': \(96, 128\)\}"),
        (replace(SETTING, deployment=Deployment(2, 1, 1)), "on one device; the deployment has tensor_parallel 2"),
        (_in(gpu="H100"), "timed on 'cpu' in float32; the scenario says gpu 'H100'"),
        (_in(expert_dtype="mxfp4"), "'expert_dtype': 'mxfp4'"),
        (_in(kv_dtype="fp8"), "'kv_dtype': 'fp8'"),
        (_in(generated_tokens=100), "context_tokens 20 to 128, not for 140"),
        (_in(prompt_tokens=10), "context_tokens 20 to 128, not for 10"),
        (_in(prompt_tokens=70, generated_tokens=10), "prompt_tokens 16 to 64, not for 70"),
        (_in(batch_size=64), "batch_size 1 to 32, not for 64"),
    ],
)
def test_settings_that_were_not_timed_are_refused(times: TimedBlocks, setting: Setting, message: str) -> None:
    times.check(SETTING)
    with pytest.raises(ValueError, match=message):
        times.check(setting)


def test_another_model_is_refused_by_every_method(times: TimedBlocks) -> None:
    other = replace(SETTING, model=replace(SHAPE, experts_per_token=4))
    with pytest.raises(ValueError, match="another shape"):
        times.decode_layer(other, Block(8, None), 8, 64)


def test_the_cost_model_adds_these_seconds(times: TimedBlocks) -> None:
    """A whole request by hand; the table is linear in the context, so the mean over steps is the value at the mean."""
    blocks = [Block(16, 16), Block(12, None), Block(8, 16), Block(16, None)]
    cost = CostModel(SHAPE, SCENARIO, times)
    predicted = cost.predict(blocks, cost.deployments()[0], 8)
    step = 1e-4 * 9 + sum(decode(b.num_experts, 8, 16 if b.window_tokens else 70) for b in blocks)
    request = 8 * (1e-5 * 40 + sum(prefill(b.num_experts, 40) for b in blocks)) + 60 * step
    assert predicted.step_seconds == pytest.approx(step, rel=0.01)  # mean context: 70 or 70.5 by convention
    assert predicted.tokens_per_second == pytest.approx(8 * 60 / request, rel=0.01)


def test_recipes_name_it_by_class_path(write: Callable[[dict[str, Any]], Path]) -> None:
    parser = ArgumentParser()
    parser.add_argument("--times", type=KernelTimes)
    name = "lit_puzzle.costs.timed_blocks.TimedBlocks"
    source = f"--times={{class_path: {name}, init_args: {{table: {write(a_table())}}}}}"
    times = parser.instantiate(parser.parse_args([source])).times
    assert times.decode_rest(SETTING, 1) == 2e-4


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda table: table.pop(key)


MALFORMED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (_without("fingerprint"), "has the keys"),
    (lambda t: t.update(extra=1), "has the keys"),
    (lambda t: t["model"].update(hidden=97), "model and fingerprint do not match"),
    (lambda t: t["model"].pop("hidden"), r"ModelShape: missing key\(s\) \['hidden'\]"),
    (lambda t: t["model"]["layer"].pop("router"), r"LayerTensors: missing key\(s\) \['router'\]"),
    (lambda t: t["decode_layer"].pop(4), "lacks combinations"),
    (lambda t: t["decode_layer"][3].update(seconds=0.0), "seconds are not positive"),
    (lambda t: t["decode_layer"][3].update(seconds=float("nan")), "NaN is not a JSON number; make it with"),
    (lambda t: t["prefill_rest"][0].pop("seconds"), "a row of prefill_rest has the keys"),
    (lambda t: t.update(decode_rest=[]), "decode_rest has no measured point"),
]


@pytest.mark.parametrize(("spoil", "message"), MALFORMED)
def test_malformed_tables_are_refused(
    write: Callable[[dict[str, Any]], Path], spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    table = a_table()
    spoil(table)
    with pytest.raises(ValueError, match=message):
        TimedBlocks(write(table))


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no table of timed blocks at .*; make it with python scripts/measure_blocks"):
        TimedBlocks(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        TimedBlocks(tmp_path / "bad.json")
