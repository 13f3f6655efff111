"""vLLM beside a model that trains: it generates with the weights that were sent; what cannot run is refused before."""

import json
from pathlib import Path

import pytest
from helpers.local_engine import LocalEngine
from helpers.vllm_environment import ROOT, needs_vllm, output_of, start_in_vllm

import lit_puzzle.generation.rollout_engine as rollout_engine
from lit_puzzle.generation.engine import Completion
from lit_puzzle.generation.processes import EngineProcess
from lit_puzzle.generation.ranks import Ranks
from lit_puzzle.generation.rollout_checks import check_answers, check_rollouts
from lit_puzzle.generation.rollout_engine import RolloutEngine, engine_options
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import Sampling

CHILD = ROOT / "lit_puzzle" / "assets" / "tiny_child"
PARENT = ROOT / "lit_puzzle" / "assets" / "tiny_parent"
VLLM = RolloutSettings("vllm")


@needs_vllm
def test_vllm_generates_with_the_weights_that_were_sent(tmp_path):
    output_of(start_in_vllm(ROOT / "tests" / "helpers" / "vllm_rollouts.py", CHILD, tmp_path / "results.json"))
    own, attention, router, again = json.loads((tmp_path / "results.json").read_text())
    for found in (own, attention, router, again):
        same = sum(one == other for one, other in zip(found["tokens"], found["expected"], strict=True))
        assert same >= len(found["tokens"]) - 1  # a draw may lie on an edge between two tokens
        assert found["largest_error"] < 5e-5
    assert attention["tokens"] != own["tokens"] and router["tokens"] != attention["tokens"]
    assert again["tokens"] == own["tokens"]
    assert 0 < attention["sent"] < router["sent"] < (CHILD / "model.safetensors").stat().st_size


def test_only_what_can_be_reloaded_is_started():
    check_rollouts(VLLM, CHILD, Ranks())
    check_rollouts(RolloutSettings(), PARENT, Ranks())
    with pytest.raises(ValueError, match="is no child"):
        check_rollouts(VLLM, PARENT, Ranks())
    with pytest.raises(ValueError, match="it must divide the 3 processes of a machine"):
        check_rollouts(RolloutSettings("vllm", tensor_parallel=2), CHILD, Ranks(size=3, local_size=3))


def test_what_needs_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"replay_routes.*Model Runner V2, which needs Triton, so a GPU"):
        check_rollouts(RolloutSettings("vllm", replay_routes=True), CHILD, Ranks())
    with pytest.raises(ValueError, match=r"tensor_parallel 2 was given; it is for GPUs"):
        check_rollouts(RolloutSettings("vllm", tensor_parallel=2), CHILD, Ranks(size=2, local_size=2))


def test_options_of_vllm():
    on_cpu = engine_options(RolloutSettings("vllm", context_tokens=99, kv_cache_gib=0.5), has_gpu=False)
    assert on_cpu == {"max_model_len": 99, "kv_cache_memory_bytes": 2**29, "enforce_eager": True}
    on_gpu = engine_options(RolloutSettings("vllm", gpu_memory_share=0.4, replay_routes=True), has_gpu=True)
    assert on_gpu == {"enable_return_routed_experts": True, "gpu_memory_utilization": 0.4, "enable_sleep_mode": True}


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([Completion([3], "stop", [-0.5])], "answered 1 of 2 prompts"),
        ([Completion([3], "stop", [-0.5]), Completion([], "stop", [])], "generated no token for prompt 1"),
        ([Completion([3], "stop", [float("nan")]), Completion([3], "stop")], "the log-probability nan; expected"),
        ([Completion([3], "stop", [float("-inf")]), Completion([3], "stop")], "the log-probability -inf; expected"),
        ([Completion([3], "stop", [0.7]), Completion([3], "stop")], "the log-probability 0.7; expected"),
    ],
)
def test_answers_that_are_refused(answers, said):
    with pytest.raises(ValueError, match=said):
        check_answers(answers, 2, "vLLM")


def test_an_engine_sleeps_while_the_model_trains(monkeypatch):
    """As on a GPU: awake for a generation and for new weights, asleep in between."""
    for call in ("sleep", "wake"):
        monkeypatch.setattr(LocalEngine, call, lambda self: None, raising=False)
    monkeypatch.setattr(rollout_engine, "EngineProcess", LocalEngine)
    engine = RolloutEngine(VLLM, CHILD)
    engine._sleeps = True
    for _ in range(2):
        engine.generate([[1, 8, 3]], Sampling(2))
    engine.read_folder(CHILD)
    engine.generate([[1, 8, 3]], Sampling(2))
    local = engine._engine
    assert isinstance(local, LocalEngine)
    assert local.calls[1:] == [
        *("load", "generate", "sleep", "wake", "generate", "sleep"),
        *("wake", "read_folder", "generate", "sleep"),
    ]


@pytest.mark.slow
def test_a_process_that_says_nothing_is_one_line(tmp_path: Path):
    """It waits for its first call, as one that hangs would."""
    process = EngineProcess("vLLM of process 0", 0)
    try:
        with pytest.raises(ValueError, match=r"vLLM of process 0 has generated nothing for 0\.2 seconds: it hangs"):
            process.receive(0.2)
    finally:
        process.close()
        process.end(0)
    assert process.process.returncode is not None
