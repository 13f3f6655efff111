"""RL recovery with an engine beside the policy, which gets the trained weights; here transformers' model, not vLLM.

tests/rl/test_vllm_recovery.py runs the same with vLLM.
"""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.local_engine import LocalEngine
from helpers.recovery_runs import GRPO, Recorder, forked, losses, make_child, make_data, make_module, make_trainer
from lightning.pytorch import Callback
from safetensors.torch import load_file

import lit_puzzle.generation.rollout_engine as rollout_engine
from lit_puzzle.data.prompts import check_lengths
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.generation.engine import Completion, EngineFailedError
from lit_puzzle.generation.rollout_checks import check_answers
from lit_puzzle.generation.rollout_settings import Correction, ImportanceSampling, RolloutSettings
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.rl.module import RLRecovery
from lit_puzzle.rl.trl_config import grpo_config
from lit_puzzle.rl.vllm_rollouts import routes_of
from lit_puzzle.run.folder import newest_checkpoint
from lit_puzzle.tiny.world import Chains
from lit_puzzle.training.checkpoints import BestCheckpoint, UpdateCheckpoint
from lit_puzzle.training.settings import LoraSettings, TrainingSettings

CHILD = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_child"
STEPS = 8
VLLM = replace(GRPO, num_iterations=1, rollouts=RolloutSettings("vllm", max_mismatch=1e-5))


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    return make_child(tmp_path_factory.mktemp("rollouts") / "child", tiny_config(num_hidden_layers=2))


class Logged(Callback):
    """Writes what is logged about the engine, and calls `on_step`."""

    def __init__(self, folder: Path, on_step: Any) -> None:
        self.file, self.on_step = folder / "sampling.jsonl", on_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        keys = [key for key in trainer.callback_metrics if "sampling" in key]
        with self.file.open("a") as stream:
            stream.write(json.dumps({key: float(trainer.callback_metrics[key]) for key in keys}) + "\n")
        self.on_step(trainer.global_step, pl_module)


def run(folder: Path, child: Path, on_step: Any, rank: int = 0, **settings: Any) -> RLRecovery:
    """A run whose engine is in this process; errors go into error.txt."""
    folder.mkdir(exist_ok=True)
    rollout_engine.EngineProcess = LocalEngine  # type: ignore[assignment, misc]  # this process is forked
    saved = [UpdateCheckpoint(every_n_updates=100), BestCheckpoint()]
    trainer = make_trainer(folder, 1, STEPS, [Recorder(folder), Logged(folder, on_step), *saved])
    module = make_module(child, **{"grpo": VLLM} | settings)
    try:
        trainer.fit(module, datamodule=make_data(16), ckpt_path=newest_checkpoint(folder))
    except EngineFailedError as error:
        (folder / "error.txt").write_text(str(error))
        raise SystemExit(3) from None
    return module


def nothing(step: int, module: RLRecovery) -> None:
    pass


def fails_at(when: int, call: str, spoil: Any, step: int, module: RLRecovery) -> None:
    """From update `when` on, the engine's answers to a call are damaged."""
    if step == when:
        LocalEngine.spoil = staticmethod(lambda name, answer: spoil(answer) if name == call else answer)


def died(answer: Any) -> None:
    raise ValueError("vLLM of process 0 was killed by SIGKILL.")


def without_one(answer: list[Any]) -> list[Any]:
    return answer[:-1]


def not_numbers(answer: list[Any]) -> list[Any]:
    answer[0].logprobs[0] = float("nan")
    return answer


@pytest.fixture(scope="module")
def whole_run(child: Path) -> Path:
    folder = child.parent / "whole"
    assert forked(1, lambda _: run(folder, child, nothing)) == [0]
    return folder


@pytest.mark.slow
def test_policy_and_engine_agree_after_every_update(whole_run: Path) -> None:
    logged = [json.loads(line) for line in (whole_run / "sampling.jsonl").read_text().splitlines()]
    last = logged[-1]
    assert last["train/sampling/sampling_logp_difference/max"] < 1e-5 and abs(last["train/sampling/kl"]) < 1e-9
    assert last["train/sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert (whole_run / "after" / "episodes.parquet").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "spoil", "said"),
    [
        ("generate", died, "was killed by SIGKILL"),
        ("generate", without_one, r"answered 15 of 16 prompts"),
        ("generate", not_numbers, "prompt 0 the log-probability nan; expected"),
        ("read_trained", died, "was killed by SIGKILL"),
    ],
)
def test_an_engine_that_fails_stops_the_run_with_its_state_saved(
    child: Path, whole_run: Path, call: str, spoil: Any, said: str
) -> None:
    folder = child.parent / f"{call} {spoil.__name__}"
    assert forked(1, lambda _: run(folder, child, partial(fails_at, 6, call, spoil))) == [3]
    assert re.search(said, (folder / "error.txt").read_text())
    newest = newest_checkpoint(folder)
    assert newest is not None and newest.name == "step=6.ckpt"
    assert forked(1, lambda _: run(folder, child, nothing)) == [0]
    assert losses(folder) == losses(whole_run)
    ours, theirs = (load_file(run / "child" / "model.safetensors") for run in (folder, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_weights_that_no_longer_arrive_are_noticed(child: Path) -> None:
    """The engine keeps its first weights: the second rollout differs by more than rounding."""
    folder = child.parent / "stale"

    def stale(step: int, module: RLRecovery) -> None:
        if step == 2:
            LocalEngine.read_trained = lambda self, weights: None  # type: ignore[method-assign]

    assert forked(1, lambda _: run(folder, child, stale)) == [3]
    assert "vLLM and the policy disagree in the rollout of update 3" in (folder / "error.txt").read_text()
    newest = newest_checkpoint(folder)
    assert newest is not None and newest.name == "step=2.ckpt"


@pytest.mark.slow
def test_adapters_are_merged_on_the_way(child: Path) -> None:
    """Adapters on attention, router and experts: the engine computes what the policy computes."""
    targets = LoraSettings(rank=2, target_modules=["q_proj", "o_proj"], target_parameters=["router.weight"])
    training = TrainingSettings(lora=targets)
    folder = child.parent / "adapters"
    assert forked(1, lambda _: run(folder, child, nothing, training=training)) == [0]
    logged = [json.loads(line) for line in (folder / "sampling.jsonl").read_text().splitlines()]
    assert logged[-1]["train/sampling/sampling_logp_difference/max"] < 1e-5


@pytest.mark.parametrize("correction", ["none", "token_mask", "sequence_truncate"])
def test_settings_of_the_correction_reach_trl(correction: Correction) -> None:
    rollouts = RolloutSettings("vllm", importance_sampling=ImportanceSampling(correction, 0.5, 2.0))
    config = grpo_config(replace(VLLM, rollouts=rollouts), 4, "32-true", torch.device("cpu"), Path(), [1.0])
    assert (config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max) == (0.5, 2.0)
    assert config.vllm_importance_sampling_mode == ("token_truncate" if correction == "none" else correction)
    assert not config.use_vllm


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "token_truncate"])
def test_the_loss_is_corrected_unless_the_mode_is_none(child: Path, mode: Correction) -> None:
    """An engine that gives every token half its probability: rho is 2 and becomes the limit 1.5, or is left out."""
    folder = child.parent / mode
    limited = RolloutSettings("vllm", importance_sampling=ImportanceSampling(mode, None, 1.5), max_mismatch=1.0)

    def ratios(step: int, module: RLRecovery) -> None:
        buffered = module.engine._trainer._buffered_inputs
        found = torch.cat([part["importance_sampling_ratio"].flatten() for part in buffered])
        with (folder / "ratios.txt").open("a") as stream:
            stream.write(f"{float(found.max()):.3f}\n")

    def halved(answer: list[Any]) -> list[Any]:
        return [replace(done, logprobs=[x - 0.6931 for x in done.logprobs or []] or None) for done in answer]

    LocalEngine.spoil = staticmethod(lambda name, answer: halved(answer) if name == "generate" else answer)
    try:
        grpo = replace(VLLM, rollouts=limited)
        assert forked(1, lambda _: run(folder, child, ratios, grpo=grpo)) == [0]
    finally:
        LocalEngine.spoil = staticmethod(lambda name, answer: answer)
    assert set((folder / "ratios.txt").read_text().split()) == {"1.000" if mode == "none" else "1.500"}


def test_completions_without_routes_are_refused() -> None:
    routes = np.zeros((3, 2, 2), dtype=np.uint8)
    assert routes_of([Completion([3], "stop", routes=routes)])[0].dtype == torch.int16
    with pytest.raises(ValueError, match="returned completions without routes"):
        routes_of([Completion([3], "stop", routes=routes), Completion([3], "stop")])


def test_prompts_must_fit_the_context_of_the_engine() -> None:
    tokenizer = load_tokenizer(CHILD)
    problem = next(iter(held_out_problems([Chains()], ["low"], 1, 0)))
    check_lengths(tokenizer, [problem], CHILD, 32, 256)
    with pytest.raises(ValueError, match=r"context - max_new_tokens leaves 8"):
        check_lengths(tokenizer, [problem], CHILD, 32, 40)


def test_top_k_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k=5 was given; with rollouts by vLLM"):
        replace(VLLM, sampling=replace(VLLM.sampling, top_k=5))


def test_no_completion_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="answered 0 of 2 prompts"):
        check_answers([], 2, "vLLM of process 0")
