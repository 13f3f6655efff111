"""Throughputs that are stated and predicted; the file and its refusals; measured in real vLLM."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.vllm_environment import PYTHON, needs_vllm

from lit_puzzle.costs.throughputs import THROUGHPUT_FILE, read_throughputs
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.run.inputs import recorded_inputs
from lit_puzzle.serve.throughput import Predicted, Stated, throughput
from lit_puzzle.serve.vllm.measured import Measured, MeasuredEngines, Workload
from lit_puzzle.spec import Scenario

PARENT, CHILD = PACKAGE / "assets" / "tiny_parent", PACKAGE / "assets" / "tiny_child"


def test_stated_numbers_come_back(tmp_path):
    results = throughput(tmp_path, PARENT, CHILD, Stated(5700, 9300, "8 x H100"))
    assert results == {"tokens_per_second/parent": 5700, "tokens_per_second/child": 9300, "speed_up": 9300 / 5700}
    assert read_throughputs(tmp_path) == Stated(5700, 9300, "8 x H100").found


def test_predictions_are_those_of_the_cost_model(tmp_path):
    scenario = Scenario("H100", 1, 96, 48, kv_dtype="bfloat16", expert_dtype="bfloat16")
    results = throughput(tmp_path, PARENT, CHILD, Predicted(scenario))
    same = (
        throughput(tmp_path / "same", PARENT, PARENT, Predicted(scenario))
        if (tmp_path / "same").mkdir() is None
        else {}
    )
    assert same["speed_up"] == 1 and results["speed_up"] > 1
    assert results["tokens_per_second/parent"] == same["tokens_per_second/child"]
    assert "cost model" in read_throughputs(tmp_path).scenario and read_throughputs(tmp_path).kind == "predicted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent": 0}, "parent 0 and child 2"),
        ({"kind": "guessed"}, "kind 'guessed'"),
        ({"scenario": " "}, "scenario is empty"),
        ({"more": 1}, "more"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    content = {"parent": 1.0, "child": 2.0, "kind": "measured", "scenario": "here", "tried": {}}
    (tmp_path / THROUGHPUT_FILE).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        read_throughputs(tmp_path)


def test_settings_that_cannot_be_measured():
    with pytest.raises(ValueError, match="there must be a batch"):
        Workload(1, 1, [])
    with pytest.raises(ValueError, match="together: true needs kv_cache_gib"):
        MeasuredEngines(together=True)
    with pytest.raises(ValueError, match="execution: compiled with tensor_parallel: 1 computes in others"):
        MeasuredEngines(clock="cpu")
    with pytest.raises(ValueError, match="execution: eager with tensor_parallel: 2 computes in others"):
        MeasuredEngines(execution="eager", clock="cpu", tensor_parallel=2)
    with pytest.raises(ValueError, match="runs both engines on one device"):
        MeasuredEngines(kv_cache_gib=1, together=True, tensor_parallel=2)


@needs_vllm
@pytest.mark.slow
def test_measured_in_vllm(tmp_path: Path) -> None:
    """The child beside itself: each batch is answered, more requests at a time are faster."""
    engines = MeasuredEngines(PYTHON, "float32", "eager", kv_cache_gib=0.05, clock="cpu", together=True)
    throughput(tmp_path, CHILD, CHILD, Measured(Workload(16, 16, [1, 16], rounds=1), engines))
    found = read_throughputs(tmp_path)
    assert found.kind == "measured" and list(found.tried) == ["1", "16"] and "vLLM 0." in found.scenario
    for model in ("parent", "child"):
        assert found.tried["16"][model] > 2 * found.tried["1"][model] > 0
    assert (found.parent, found.child) == (found.tried["16"]["parent"], found.tried["16"]["child"])


def settings_alone(folder: Path) -> dict[str, Path]:
    """Return folders of parent and child with config.json and nothing else."""
    for name, whole in {"parent": PARENT, "child": CHILD}.items():
        (folder / name).mkdir()
        shutil.copyfile(whole / "config.json", folder / name / "config.json")
    return {name: folder / name for name in ("parent", "child")}


def test_predictions_need_no_weights(tmp_path: Path) -> None:
    scenario = Scenario("H100", 1, 96, 48, kv_dtype="bfloat16", expert_dtype="bfloat16")
    for name, folders in {"whole": {"parent": PARENT, "child": CHILD}, "alone": settings_alone(tmp_path)}.items():
        (tmp_path / name).mkdir()
        throughput(tmp_path / name, **folders, source=Predicted(scenario))
    assert read_throughputs(tmp_path / "alone") == read_throughputs(tmp_path / "whole")
    configs = [
        {key: one.content["config"] for key, one in recorded_inputs(tmp_path / name).items()}
        for name in ("alone", "whole")
    ]
    assert configs[0] == configs[1] and configs[0]["parent"] != configs[0]["child"]  # as reports compare


DRAWN = """
import torch
from lit_puzzle.serve.vllm.random_weights import draw
generator = torch.Generator().manual_seed(0)
def drawn(name, shape, dtype=torch.float32):
    tensor = torch.full(shape, 7, dtype=dtype)
    draw(name, tensor, generator)
    return tensor
layer = "model.layers.0."
assert drawn(layer + "input_layernorm.weight", (8,)).eq(1).all()
assert drawn("model.norm.weight", (8,)).eq(1).all()
for zero in ("attn.qkv_proj.bias", "attn.sinks", "mlp.router.bias", "mlp.experts.w13_bias"):
    assert drawn(layer + zero, (8,)).eq(0).all()
for weight in ("mlp.router.weight", "attn.o_proj.weight", "mlp.experts.w2_weight"):
    assert .09 < drawn(layer + weight, (64, 100)).std() < .11
assert .9 < drawn("model.embedding.weight", (64, 100)).std() < 1.1
codes = drawn(layer + "mlp.experts.w13_weight", (64, 100), torch.uint8)
assert (codes.min(), codes.max()) == (0, 255)
assert drawn(layer + "mlp.experts.w13_weight_scale", (8,), torch.uint8).eq(120).all()
hidden = torch.nn.functional.rms_norm(drawn("model.embedding.weight", (256, 64)), (64,))
chosen = (hidden @ drawn(layer + "mlp.router.weight", (16, 64)).T).topk(4).indices.flatten().bincount(minlength=16)
assert chosen.min() > 256 * 4 / 16 / 3, chosen  # of 64 for each, by 256 tokens
"""


@needs_vllm
@pytest.mark.slow
def test_random_weights_use_all_experts() -> None:
    done = subprocess.run([PYTHON, "-c", DRAWN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_vllm
@pytest.mark.slow
def test_random_weights_in_vllm(tmp_path: Path) -> None:
    """vLLM's gpt-oss and ours start from config.json alone."""
    folders, work = settings_alone(tmp_path), Workload(16, 16, [1, 16], rounds=1)
    engines = MeasuredEngines(PYTHON, "float32", "eager", kv_cache_gib=0.05, clock="cpu", together=True)
    with pytest.raises(ValueError, match="weights: random"):
        throughput(tmp_path, **folders, source=Measured(work, engines))
    throughput(tmp_path, **folders, source=Measured(work, dataclasses.replace(engines, weights="random")))
    found = read_throughputs(tmp_path)
    assert "weights random" in found.scenario
    for model in ("parent", "child"):
        assert found.tried["16"][model] > 2 * found.tried["1"][model] > 0


def test_an_engine_that_starts_is_killed_when_its_input_ends() -> None:
    starting = """
import queue, threading, time
from lit_puzzle.serve.vllm.driver import read_steps
steps = queue.Queue()
threading.Thread(target=read_steps, args=(steps,), daemon=True).start()
print(steps.get(), flush=True)
time.sleep(600)
"""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", starting]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("a step\n")
        process.stdin.flush()
        assert process.stdout.readline() == "a step\n"
        process.stdin.close()
        assert process.wait(timeout=60) == -signal.SIGKILL
