"""The engine against `GRPOTrainer.train()` (bit for bit), against an independent GRPO loss, and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import GptOssForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from lit_puzzle.rl.settings import GRPOSettings
from lit_puzzle.rl.trl_engine import GRPOEngine, grpo_config, trl_precision

PROMPTS = 8
SETTINGS = GRPOSettings(num_generations=4, completions_per_device=8, max_completion_length=6, loss_type="grpo")
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
    return grpo_config(settings, accumulate, "32-true", torch.device("cpu"), folder, seed=3, reward_weights=[1.0])


def optimiser(model: GptOssForCausalLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def update(engine: GRPOEngine, batches: Any, optimizer: torch.optim.Optimizer, step: int) -> list[float]:
    """One optimiser step in the plain way, the losses of its slices."""
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
    "accumulation": (replace(SETTINGS, completions_per_device=4, loss_type="dapo"), 2, 5),
    "reuse": (replace(SETTINGS, completions_per_device=4, steps_per_generation=4, num_iterations=2), 2, 10),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_grpo_trainer(
    case: str, tiny_model: GptOssForCausalLM, tokenizer: Any, prompts: Dataset, tmp_path: Path
) -> None:
    settings, accumulate, steps = CASES[case]
    ours, theirs = tiny_model, GptOssForCausalLM(tiny_model.config)
    theirs.load_state_dict(ours.state_dict())
    arguments = config(settings, accumulate, tmp_path)
    arguments.max_steps, arguments.max_grad_norm = steps, CLIP
    reference = optimiser(theirs)
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
    optimizer, batches = optimiser(ours), endless(engine.loader)
    for step in range(steps):
        torch.manual_seed(step)  # whatever happens to the global randomness, the engine has its own
        update(engine, batches, optimizer, step)
    changed = 0
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
        changed += int(not torch.equal(parameter, theirs.get_parameter(name) * 0))
    assert changed > 10
