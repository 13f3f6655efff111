"""Plans of small parents as files, and the logits of the folders that are made of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.spec import BlockSpec, Plan

PROMPT = torch.randint(128, (2, 30), generator=torch.Generator().manual_seed(0))


def save_plan(folder: Path, parent: Path, blocks: list[tuple[tuple[int, ...], int | None]]) -> Path:
    plan = Plan(fingerprint(parent), 8, tuple(BlockSpec(*block) for block in blocks))
    plan.save(folder / "plan.json")
    return folder / "plan.json"


def logits_of(folder: Path, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()
    with torch.no_grad():
        return model(PROMPT).logits
