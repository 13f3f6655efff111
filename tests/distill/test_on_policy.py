"""On-policy distillation through `Trainer.fit`: what it learns, trains and writes; resumed, sharded, accumulated."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.on_policy_runs import ROLLOUTS, Pair, fit, make_module, make_pair, results, weights
from helpers.recovery_runs import forked, kill_self, losses, make_data, make_trainer, validations
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from lit_puzzle.callbacks.generation_length import GenerationLength
from lit_puzzle.callbacks.rollout_samples import RolloutSamples
from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.environments.episodes import read_rows
from lit_puzzle.generation.engine import EngineFailedError
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.training.settings import LoraSettings, TrainingSettings
from lit_puzzle.training.sharding import full


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Pair:
    return make_pair(tmp_path_factory.mktemp("on_policy"), tiny_config)


def run(work: Any, processes: int = 1) -> None:
    assert forked(processes, work) == [0] * processes


def moved(pair: Pair, folder: Path) -> set[str]:
    """Tensors of the child that training has changed."""
    before, after = (load_file(path / "model.safetensors") for path in (pair.child, folder / "child"))
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- what a run does ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_learns_evaluates_and_writes_the_child(pair: Pair, tmp_path: Path) -> None:
    folder, callbacks = tmp_path / "run", [GenerationLength(pair.child, window=1), RolloutSamples(1, 2)]
    adam = partial(torch.optim.AdamW, lr=1e-2)
    rollouts = replace(ROLLOUTS, completions_per_device=12)
    run(lambda rank: fit(folder, pair, 24, optimizer=adam, callbacks=callbacks, on_policy=rollouts))
    found = results(folder)
    assert found["loss/last"] < 0.7 * found["loss/first"]
    assert {f"accuracy/{e}/{w}" for e in ("low", "high") for w in ("before", "after", "gain", "gain_se")} < found.keys()
    assert {"tokens/low/of_parent", "looping/high/after", "unfinished/low/before"} < found.keys()
    changed = moved(pair, folder)
    assert changed and not any(".experts." in name or ".router." in name for name in changed)
    assert len(validations(folder)) == 8
    rows = read_rows(folder / "rollouts" / "episodes.jsonl")
    assert len(rows) == 48 and {row.finish for row in rows} == {"stop", "length"}


@pytest.mark.parametrize(
    ("part", "kinds"),
    [
        ("router", {"mlp.router"}),
        ("attention", {"self_attn"}),
        ("attention_and_router", {"mlp.router", "self_attn"}),
    ],
)
def test_a_part_trains_alone(pair: Pair, tmp_path: Path, part: Any, kinds: set[str]) -> None:
    adam = partial(torch.optim.AdamW, lr=1e-2)
    run(lambda rank: fit(tmp_path / "run", pair, 3, optimizer=adam, training=TrainingSettings(trainable=part)))
    changed = moved(pair, tmp_path / "run")
    assert changed and all(any(f".{kind}." in name for kind in kinds) for name in changed)
    assert all(any(f".{kind}." in name for name in changed) for kind in kinds)


def test_top_k_logits_of_all_but_one_token_are_all(pair: Pair, tmp_path: Path) -> None:
    loss = LossSettings("kl_mix")
    for name, top_k in (("all", None), ("top", 127)):
        settings = replace(ROLLOUTS, top_k=top_k)
        run(lambda rank: fit(tmp_path / name, pair, 3, loss=loss, on_policy=settings))  # noqa: B023
    found = [{k: float.fromhex(v) for k, v in losses(tmp_path / name).items()} for name in ("all", "top")]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.slow
def test_one_batch_of_four_is_two_batches_of_two(pair: Pair, tmp_path: Path) -> None:
    run(lambda rank: fit(tmp_path / "1x4", pair, 3))
    accumulate = {"accumulate_grad_batches": 2, "val_check_interval": 6}
    halves = replace(ROLLOUTS, completions_per_device=2)
    run(lambda rank: fit(tmp_path / "2x2", pair, 3, trainer=accumulate, on_policy=halves))
    together, apart = weights(tmp_path / "1x4"), weights(tmp_path / "2x2")
    for name, tensor in together.items():
        torch.testing.assert_close(apart[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


# ---- resuming and sharding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(pair: Pair, tmp_path: Path, processes: int) -> None:
    """With dropout in adapters, several updates a rollout, and killed between two of them."""
    lora = LoraSettings(rank=2, dropout=0.3)
    settings: dict[str, Any] = {"training": TrainingSettings(lora=lora)}
    rollouts = replace(ROLLOUTS, completions_per_device=2, steps_per_generation=3)

    def go(folder: Path, rank: int, kill_at: int | None = None) -> None:
        torch.manual_seed(0)  # of adapters
        stop = lambda step: kill_self() if step == kill_at else None  # noqa: E731
        fit(folder, pair, 8, processes, rank, stop, on_policy=rollouts, **settings)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(lambda rank: go(whole, rank), processes)
    assert forked(processes, lambda rank: go(killed, rank, 5)) == [-9] * processes
    assert (killed / "checkpoints" / "step=4.ckpt").exists() and not (killed / "results0.json").exists()
    run(lambda rank: go(killed, rank), processes)
    for rank in range(processes):
        assert losses(killed, rank) == losses(whole, rank) and len(losses(whole, rank)) == 8
    assert validations(killed) == validations(whole) and results(killed) == results(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(killed)[name], tensor), name
    children = [(folder / "child" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert children[0] == children[1]


class WatchShards(Callback):
    """Keeps the first gradients; sharded, every parameter of both models is half here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step > 0:
            return
        gradients = {name: full(p.grad).clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        torch.save(gradients, self.folder / f"gradients{trainer.global_rank}.pt")
        for name, parameter in pl_module.named_parameters():
            halved = isinstance(parameter, DTensor) and parameter.to_local().numel() * 2 == parameter.numel()
            assert halved == (trainer.world_size > 1), name


VARIANTS: dict[str, dict[str, Any]] = {
    "weights": {},
    "router, gathered layer by layer": {"training": TrainingSettings(trainable="router")},
    "top-k, checkpointing": {"training": TrainingSettings(gradient_checkpointing=True)},
}
ON_POLICY: dict[str, dict[str, Any]] = {
    "weights": {},
    "router, gathered layer by layer": {"unshard_rollouts": False},
    "top-k, checkpointing": {"top_k": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_two_processes_equal_one(pair: Pair, tmp_path: Path, variant: str) -> None:
    def work(rank: int, folder: Path, processes: int) -> None:
        rollouts = replace(ROLLOUTS, completions_per_device=4 // processes, **ON_POLICY[variant])
        fit(folder, pair, 3, processes, rank, None, [WatchShards(folder)], on_policy=rollouts, **VARIANTS[variant])

    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    run(lambda rank: work(rank, one, 1))
    run(lambda rank: work(rank, two, 2), 2)
    for kind in ("gradients", "weights"):
        reference = torch.load(one / f"{kind}0.pt", weights_only=True)
        for rank in (0, 1):
            sharded = torch.load(two / f"{kind}{rank}.pt", weights_only=True)
            assert sharded.keys() == reference.keys() and reference
            for name, tensor in reference.items():
                largest = float(tensor.abs().max())
                torch.testing.assert_close(
                    sharded[name], tensor, atol=2e-5 * largest, rtol=1e-5, msg=f"{kind} {name} on {rank}"
                )
    single, both = ({k: float.fromhex(v) for k, v in validations(folder)} for folder in (one, two))
    assert both == pytest.approx(single, rel=1e-5)
    differ = {"loss/first", "loss/last"}  # of the first process
    numbers = [{k: v for k, v in results(folder).items() if k not in differ} for folder in (one, two)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=1e-6)


# ---- failures and bad input ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failed_engine_leaves_the_state_before_its_batch(pair: Pair, tmp_path: Path) -> None:
    """The checkpoint that is saved then resumes to the run that had no failure."""

    class Fail(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:

                def fail(*_: Any) -> None:
                    raise EngineFailedError("the engine is gone")

                pl_module.sampler.sample = fail

    def stopped(rank: int) -> None:
        with pytest.raises(EngineFailedError, match="gone"):
            fit(tmp_path / "failed", pair, 5, callbacks=[Fail()])

    run(stopped)
    assert (tmp_path / "failed" / "checkpoints" / "step=3.ckpt").exists()
    for name in ("failed", "whole"):
        run(lambda rank: fit(tmp_path / name, pair, 5))  # noqa: B023
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "failed")[name], tensor), name


def test_impossible_settings_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="name one of them"):
        make_module(Pair(pair.parent.parent, pair.child))
    for loss in (LossSettings("kl_mix", hidden=1.0), LossSettings("kl_mix", lm=0.1)):
        with pytest.raises(ValueError, match="distributions of the completions' tokens only"):
            make_module(pair, loss=loss)
    with pytest.raises(ValueError, match="top-k logits contain no hidden states and no other temperatures"):
        make_module(pair, loss=LossSettings("kl_mix", temperature=2.0), on_policy=replace(ROLLOUTS, top_k=8))
    with pytest.raises(ValueError, match="top_k=128 was given; the vocabulary has 128"):
        make_module(pair, on_policy=replace(ROLLOUTS, top_k=128))
    with pytest.raises(ValueError, match=r"on_policy\.completions_per_device=0"):
        replace(ROLLOUTS, completions_per_device=0)
    with pytest.raises(ValueError, match=r"on_policy\.best_within=0"):
        replace(ROLLOUTS, best_within=0.0)
    with pytest.raises(ValueError, match=r"logprobs: true was given\. On-policy distillation"):
        replace(ROLLOUTS, sampling=Sampling(6, logprobs=True))
    with pytest.raises(ValueError, match=r"on_policy\.rollouts\.replay_routes"):
        replace(ROLLOUTS, rollouts=RolloutSettings("vllm", replay_routes=True))
    with pytest.raises(ValueError, match="trains no adapter on the head"):
        make_module(pair, training=TrainingSettings(lora=LoraSettings(target_modules=["lm_head"])))


def test_rollouts_that_do_not_fit_are_refused(pair: Pair, tmp_path: Path) -> None:
    def refused(message: str, accumulate: int = 1, **settings: Any) -> None:
        module = make_module(pair, on_policy=replace(ROLLOUTS, **settings))
        module.trainer = make_trainer(tmp_path, 1, 1, [], accumulate_grad_batches=accumulate)
        module.trainer.datamodule = make_data(prompts=8)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=message):
            module.setup("fit")

    refused("8 training prompts were given; one rollout of 9 completions", completions_per_device=9)
    refused(
        r"An epoch of 1 batches does not contain whole updates", 2, completions_per_device=8, steps_per_generation=1
    )
