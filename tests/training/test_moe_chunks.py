"""Experts in chunks: the same losses and gradients, less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.live_bytes import LiveBytes

from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.training.load_child import load_child
from lit_puzzle.training.settings import LoraSettings, TrainingSettings

CHILD: Path = PACKAGE / "assets" / "tiny_child"
EXPERTS = LoraSettings(target_modules=["q_proj"], target_parameters=["experts.down_proj", "router.weight"])


def step(tokens: int | None, checkpointing: bool, **settings: Any) -> tuple[list[torch.Tensor], int]:
    """Loss and all gradients of one batch of 2 x 100 tokens, and the most bytes that were alive."""
    torch.manual_seed(0)
    how = TrainingSettings(moe_chunk_tokens=tokens, gradient_checkpointing=checkpointing, **settings)
    child = load_child(None, CHILD, how).train()
    ids = torch.randint(3, 100, (2, 100), generator=torch.Generator().manual_seed(1))
    with LiveBytes() as live:
        loss = child(ids, labels=ids).loss
        loss.backward()
    return [loss.detach(), *(x.grad for x in child.parameters() if x.grad is not None)], live.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [{}, {"freeze": []}, {"lora": EXPERTS}], ids=["default", "all", "adapters"])
def test_chunks_give_the_same_gradients_with_less_memory(settings: dict[str, Any], checkpointing: bool) -> None:
    whole, whole_peak = step(None, checkpointing, **settings)
    chunked, peak = step(30, checkpointing, **settings)
    assert len(whole) == len(chunked) > 10
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-4)
    if settings != {"freeze": []}:  # gradients of whole expert matrices, one for each chunk, outweigh few tokens
        assert peak < (0.9 if checkpointing else 0.8) * whole_peak


def test_short_batches_are_not_divided() -> None:
    for one, other in zip(step(None, False)[0], step(200, False)[0], strict=True):
        assert torch.equal(one, other)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="moe_chunk_tokens=0"):
        TrainingSettings(moe_chunk_tokens=0)
