"""The engine against `GRPOTrainer.train()` (bit for bit), against an independent GRPO loss, and resumed."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.grpo_settings import change
from helpers.independent_grpo import independent_grpo_loss
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GptOssForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from lit_puzzle.rl.settings import GRPOLossSettings, GRPOSettings, RolloutSampling
from lit_puzzle.rl.trl_config import grpo_config, trl_precision
from lit_puzzle.rl.trl_engine import GRPOEngine
from lit_puzzle.training.settings import LoraSettings
from lit_puzzle.training.trainable import add_adapters

PROMPTS = 8
SETTINGS = change(
    GRPOSettings(), num_generations=4, completions_per_device=8, max_new_tokens=6, loss_type="grpo", seed=3
)
LEARNING_RATE, CLIP = 3e-3, 0.5


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 128)}
    tokens = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture
def prompts() -> Dataset:
    texts = [" ".join(f"w{3 + (7 * row + column) % 120}" for column in range(3 + row % 4)) for row in range(PROMPTS)]
    efforts = ["low", "high"] * (PROMPTS // 2)
    return Dataset.from_dict(
        {"prompt": texts, "answer": ["w9"] * PROMPTS, "effort": efforts, "environment": ["words"] * PROMPTS}
    )


def reward(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Even tokens are good, and short completions: varied enough for every group."""
    return [sum(token % 2 == 0 for token in ids) - 0.1 * len(ids) for ids in completion_ids]


def config(settings: GRPOSettings, accumulate: int, folder: Path) -> GRPOConfig:
    return grpo_config(settings, accumulate, "32-true", torch.device("cpu"), folder, reward_weights=[1.0])


def build_optimizer(model: GptOssForCausalLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def update(engine: GRPOEngine, batches: Any, optimizer: torch.optim.Optimizer, step: int) -> list[float]:
    """One optimizer step in the plain way, the losses of its slices."""
    losses = []
    for _ in range(engine.config.gradient_accumulation_steps):
        loss = engine.loss(next(batches), step)
        loss.backward()
        losses.append(loss.item())
    torch.nn.utils.clip_grad_norm_(engine.policy.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return losses


def endless(loader: Any) -> Any:
    while True:
        yield from loader


CASES = {
    "plain": (SETTINGS, 1, 5),
    "accumulation": (change(SETTINGS, completions_per_device=4, loss_type="dapo"), 2, 5),
    "reuse": (change(SETTINGS, completions_per_device=4, steps_per_generation=4, num_iterations=2), 2, 10),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_grpo_trainer(
    case: str, tiny_model: GptOssForCausalLM, tokenizer: Any, prompts: Dataset, tmp_path: Path
) -> None:
    settings, accumulate, steps = CASES[case]
    ours, theirs, before = tiny_model, deepcopy(tiny_model), deepcopy(tiny_model)
    arguments = config(settings, accumulate, tmp_path)
    arguments.max_steps, arguments.max_grad_norm = steps, CLIP
    reference = build_optimizer(theirs)
    schedule = torch.optim.lr_scheduler.ConstantLR(reference, factor=1.0)
    GRPOTrainer(
        model=theirs,
        reward_funcs=[reward],
        args=arguments,
        train_dataset=prompts,
        processing_class=tokenizer,
        optimizers=(reference, schedule),
    ).train()

    engine = GRPOEngine(ours, tokenizer, prompts, [reward], config(settings, accumulate, tmp_path))
    ours.train()
    optimizer, batches = build_optimizer(ours), endless(engine.loader)
    for step in range(steps):
        torch.manual_seed(step)  # whatever happens to the global randomness, the engine has its own
        update(engine, batches, optimizer, step)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
        assert not torch.equal(parameter, before.get_parameter(name)), f"{name} was not trained"


LOSSES = {
    "grpo": change(SETTINGS, num_iterations=2),
    "dr_grpo": change(SETTINGS, loss_type="dr_grpo", scale_rewards="none", epsilon_high=0.3, num_iterations=2),
    "dapo": change(SETTINGS, loss_type="dapo", completions_per_device=4, steps_per_generation=4, epsilon_high=0.28),
    "bnpo": change(
        SETTINGS, loss_type="bnpo", scale_rewards="batch", mask_truncated_completions=True, num_iterations=2
    ),
    "sequence": change(SETTINGS, importance_sampling_level="sequence", epsilon=0.02, num_iterations=2),
    "kl": change(SETTINGS, beta=0.1, num_iterations=2),
}


@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_gradients_equal_independent_grpo(
    case: str, tiny_model: GptOssForCausalLM, tokenizer: Any, prompts: Dataset, tmp_path: Path
) -> None:
    settings, accumulate = LOSSES[case], 2 if case == "dapo" else 1
    start = deepcopy(tiny_model)  # both the policy that sampled and the reference
    policy: Any = tiny_model if settings.loss.beta == 0 else add_adapters(tiny_model, LoraSettings(rank=4))
    engine = GRPOEngine(policy, tokenizer, prompts, [reward], config(settings, accumulate, tmp_path))
    policy.train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer, batches, shares = torch.optim.SGD(trained, lr=1.0), endless(engine.loader), []
    for step in range(4 if case == "dapo" else 2):
        loss = engine.loss(next(batches), step)
        buffered = engine._trainer._buffered_inputs
        theirs, share = independent_grpo_loss(
            policy, start, buffered, step % len(buffered), settings, accumulate, reward
        )
        ours_grad = torch.autograd.grad(loss, trained, allow_unused=True)
        theirs_grad = torch.autograd.grad(theirs, trained, allow_unused=True)
        assert loss.item() == pytest.approx(theirs.item(), abs=1e-6)
        for one, other in zip(ours_grad, theirs_grad, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
        for parameter, gradient in zip(trained, ours_grad, strict=True):
            parameter.grad = gradient
        optimizer.step()
        shares.append(share)
    assert max(shares) > 0, "the update was too small for clipping to matter"
    assert any(part["advantages"].abs().max() > 0.1 for part in buffered)


def test_resumes_bit_for_bit(tiny_model: GptOssForCausalLM, tokenizer: Any, prompts: Dataset, tmp_path: Path) -> None:
    """Saved in the middle of a generation batch and of an epoch, and again in a later epoch."""
    settings = change(SETTINGS, completions_per_device=4, steps_per_generation=4, num_iterations=2)

    def start() -> tuple[GRPOEngine, torch.optim.Optimizer]:
        policy = deepcopy(tiny_model).train()
        engine = GRPOEngine(policy, tokenizer, prompts, [reward], config(settings, 2, tmp_path))
        return engine, build_optimizer(policy)

    engine, optimizer = start()
    batches, whole, saved = endless(engine.loader), [], {}
    for step in range(14):  # an epoch is 8 updates
        if step in (3, 11):
            ours, weights = engine.state_dict(), engine.policy.state_dict()
            torch.save((ours, engine.loader.state_dict(), weights, optimizer.state_dict()), tmp_path / f"{step}.pt")
            saved[step] = tmp_path / f"{step}.pt"
        whole.append(update(engine, batches, optimizer, step))
    for begin, file in saved.items():
        engine, optimizer = start()
        state, position, weights, moments = torch.load(file, weights_only=True)
        engine.policy.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        engine.load_state_dict(state)
        engine.loader.load_state_dict(position)
        batches = endless(engine.loader)
        assert [update(engine, batches, optimizer, step) for step in range(begin, 14)] == whole[begin:]
    assert len({loss for step in whole for loss in step}) > 20


def test_records_each_rollout_once_and_leaves_global_randomness_alone(
    tiny_model: GptOssForCausalLM, tokenizer: Any, prompts: Dataset, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    settings = change(SETTINGS, num_iterations=2)
    engine = GRPOEngine(tiny_model.train(), tokenizer, prompts, [reward], config(settings, 1, tmp_path))
    batches = endless(engine.loader)
    engine.loss(next(batches), 0)
    rollout = engine.take_rollout()
    (part,) = engine._trainer._buffered_inputs
    assert sorted(rollout["completion_lengths"].tolist()) == sorted(part["completion_mask"].sum(1).tolist())
    ended = int((part["completion_ids"] == 2).any(1).sum())
    assert int(rollout["truncated"].sum()) == 8 - ended
    assert len(rollout["effort"]) == len(rollout["environment"]) == 8
    assert [rollout["effort"][0]] * 4 == rollout["effort"][:4]  # a group has one prompt
    assert engine.metrics()["completions/mean_length"] == rollout["completion_lengths"].float().mean().item()
    engine.loss(next(batches), 0)
    assert engine.take_rollout() == {}
    assert "reward" not in engine.metrics()
    assert torch.equal(torch.rand(3), expected)


def test_refuses_evaluation_mode_and_other_world_sizes(
    tiny_model: GptOssForCausalLM, tokenizer: Any, prompts: Dataset, tmp_path: Path
) -> None:
    engine = GRPOEngine(tiny_model.eval(), tokenizer, prompts, [reward], config(SETTINGS, 1, tmp_path))
    with pytest.raises(ValueError, match="evaluation mode"):
        engine.loss(next(iter(engine.loader)), 0)
    with pytest.raises(ValueError, match="written by 2 processes"):
        engine.load_state_dict({"processes": [{}, {}]})


def test_precision_is_mapped_in_one_place() -> None:
    assert trl_precision("bf16-mixed") == {"bf16": True, "fp16": False}
    assert trl_precision("32-true") == {"bf16": False, "fp16": False}
    for refused in ("64-true", "bf16-true", "16-mixed"):
        with pytest.raises(ValueError, match=refused):
            trl_precision(refused)


def test_batches_are_checked_early() -> None:
    settings = change(SETTINGS, completions_per_device=6)
    with pytest.raises(ValueError, match="multiple of 4"):
        settings.check_batch(accumulate_grad_batches=1, processes=1, prompts=8)
    settings.check_batch(accumulate_grad_batches=2, processes=1, prompts=8)
    with pytest.raises(ValueError, match="one generation batch needs 4"):
        SETTINGS.check_batch(accumulate_grad_batches=1, processes=2, prompts=3)
    with pytest.raises(ValueError, match="whole updates"):
        change(SETTINGS, steps_per_generation=1).check_batch(accumulate_grad_batches=3, processes=1, prompts=8)
    with pytest.raises(ValueError, match="num_generations=1"):
        GRPOSettings(num_generations=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RolloutSampling(temperature=0.0), "temperature=0.0"),
        (lambda: GRPOSettings(steps_per_generation=0), "steps_per_generation=0"),
        (lambda: GRPOLossSettings(epsilon=-0.1), "epsilon=-0.1"),
        (
            lambda: GRPOLossSettings(loss_type="ppo"),  # type: ignore[arg-type]
            r"loss_type is 'ppo'; allowed: \['grpo', 'dr_grpo'",
        ),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_policy_that_gives_no_probabilities_is_one_error(
    tiny_model: GptOssForCausalLM, tokenizer: Any, prompts: Dataset, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_model.lm_head.weight.fill_(float("nan"))
    engine = GRPOEngine(tiny_model, tokenizer, prompts, [reward], config(SETTINGS, 1, tmp_path))
    tiny_model.train()
    with pytest.raises(ValueError, match=r"logits are not finite in the rollout of update 5\. Lower the learning rate"):
        engine.loss(next(iter(engine.loader)), 4)
