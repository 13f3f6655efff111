"""Bench: a distillation step against a plain forward of the parent and a plain forward + backward of the child.

    python scripts/bench/kd.py [--runs 9] [--hidden 0.0] [--checkpointing]

The embedded tiny parent and child, 4 sequences of 512 tokens in documents of 64, float32, one thread; experts and
router frozen, every token but a document's first a target. The plain sides compute logits and, for the child, the
language-model loss on them: what any training does. The sides take turns and are timed in CPU seconds; the ratio is
the median of the runs' ratios. Goal: tokens per CPU-second of distillation at least 0.9 of those of the two plain
passes one after the other. Ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lit_puzzle.data.packing import model_inputs
from lit_puzzle.distill.distillation_loss import distillation_loss
from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.model.loading import load_model
from lit_puzzle.model.modules import model_family
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.training.trainable import freeze_parameters

ROWS, TOKENS, DOCUMENT = 4, 512, 64


def make_batch() -> dict[str, Tensor]:
    ids_BT = torch.randint(3, 110, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    places_BT = torch.arange(TOKENS).expand(ROWS, -1)
    return {
        "input_ids": ids_BT,
        "position_ids": places_BT % DOCUMENT,
        "document_ids": places_BT // DOCUMENT,
        "loss_mask": places_BT % DOCUMENT > 0,
    }


def plain_parent(parent: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        parent(**model_inputs(parent, batch))


def plain_child(child: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    logits_BTV = child(**model_inputs(child, batch)).logits
    targets_BT = batch["input_ids"].masked_fill(~batch["loss_mask"], -100)
    cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets_BT[:, 1:].flatten()).backward()
    child.zero_grad()


def distill(child: PreTrainedModel, parent: PreTrainedModel, batch: dict[str, Tensor], settings: LossSettings) -> None:
    (distillation_loss(child, parent, batch, settings).loss / batch["input_ids"].numel()).backward()
    child.zero_grad()


def training_pair(checkpointing: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the tiny parent, frozen, and the tiny child as it trains."""
    parent, child = (
        load_model(PACKAGE / "assets" / name, "float32", "sink_attention") for name in ("tiny_parent", "tiny_child")
    )
    parent.requires_grad_(False)
    freeze_parameters(child, model_family(child).layer.frozen)
    if checkpointing:
        child.gradient_checkpointing_enable({"use_reentrant": False})
    child.train()
    return parent, child


def cpu_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(runs: int, hidden: float, checkpointing: bool) -> None:
    torch.set_num_threads(1)
    parent, child = training_pair(checkpointing)
    batch, settings = make_batch(), LossSettings(hidden=hidden)
    sides: dict[str, Callable[[], None]] = {
        "parent": lambda: plain_parent(parent, batch),
        "child": lambda: plain_child(child, batch),
        "distillation": lambda: distill(child, parent, batch, settings),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(-2, runs):  # two to warm up
        for name in sides:
            measured = cpu_seconds(sides[name])
            if run >= 0:
                seconds[name].append(measured)
    sums = [parent + child for parent, child in zip(seconds["parent"], seconds["child"], strict=True)]
    ratios = [ours / plain for ours, plain in zip(seconds["distillation"], sums, strict=True)]
    median = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = ROWS * TOKENS
    print(f"CPU seconds: {median}; ratio per run: {min(ratios):.3f} to {max(ratios):.3f}")
    result = {
        "name": "kd",
        "ours": tokens / median["distillation"],
        "reference": tokens / statistics.median(sums),
        "ratio": 1 / statistics.median(ratios),
        "hidden": hidden,
        "checkpointing": checkpointing,
        "unit": "tokens per CPU-second",
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each side, taking turns")
    parser.add_argument("--hidden", type=float, default=0.0, help="weight of the distance of hidden states")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the child's activations, on both sides")
    chosen = parser.parse_args()
    main(chosen.runs, chosen.hidden, chosen.checkpointing)
