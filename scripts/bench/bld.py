"""Bench: one step of blockwise distillation for all candidates, against the sum of training each of them alone.

    python scripts/bench/bld.py [--runs 5]

The embedded tiny parent with every candidate of 4, 8 or 12 experts and of windows 16 and 48 (24 blocks), 2 sequences
of 512 tokens in documents of 64, float32, one thread, AdamW. Alone, a block needs a parent forward up to its layer of
its own (no logits), then the same forward, backward and update. The sides take turns; CPU seconds, medians; `ratio` is
the median over runs of all together / sum of alone. Ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from lit_puzzle.distill.block_losses import TrainableBlock, block_errors
from lit_puzzle.distill.block_selection import SelectedBlock
from lit_puzzle.model.blocks import PuzzleModel, with_own_blocks
from lit_puzzle.model.loading import load_model
from lit_puzzle.model.modules import model_family
from lit_puzzle.model.surgery import prune_layer
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.spec import BlockSpec

ROWS, TOKENS, DOCUMENT = 2, 512, 64


def make_batch() -> dict[str, Tensor]:
    ids_BT = torch.randint(3, 110, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    places_BT = torch.arange(TOKENS).expand(ROWS, -1)
    return {"input_ids": ids_BT, "position_ids": places_BT % DOCUMENT, "document_ids": places_BT // DOCUMENT}


def make_blocks(parent: PuzzleModel) -> list[TrainableBlock]:
    names, made = model_family(parent).layer, []
    kinds = ("weight", "bias")
    attention = tuple(f"{names.attention}.{part}.{kind}" for part in names.projections for kind in kinds)
    for layer, own in enumerate(parent.config.block_configs):
        everything, window = tuple(range(own["num_local_experts"] or 0)), own["sliding_window"]
        router = names.router_tensors
        selected = [
            SelectedBlock(layer, f"experts={count}", BlockSpec(everything[:count], window), router, False, True)
            for count in (4, 8, 12)
        ]
        if window is None:
            selected += [
                SelectedBlock(layer, f"window={tokens}", BlockSpec(everything, tokens), attention, True, False)
                for tokens in (16, 48)
            ]
        decoder: Any = parent.model.layers[layer]
        for block in selected:
            tensors = {name: decoder.get_parameter(name) for name in block.tensors}
            made.append(TrainableBlock(block, prune_layer(tensors, block.block.experts, names), names))
    return made


def step(
    parent: PuzzleModel,
    blocks: list[TrainableBlock],
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
) -> None:
    optimizer.zero_grad()
    for _, error, norm in block_errors(parent, blocks, batch, batch["document_ids"] >= 0, lambda tensor: tensor):
        torch.autograd.backward(error / norm)
    optimizer.step()


def cpu_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(runs: int) -> None:
    torch.set_num_threads(1)
    loaded = load_model(PACKAGE / "assets" / "tiny_parent", "float32", "sink_attention")
    parent, batch = with_own_blocks(loaded).requires_grad_(False).eval(), make_batch()
    blocks = make_blocks(parent)
    together = torch.optim.AdamW([p for block in blocks for p in block.parameters()])
    alone = [torch.optim.AdamW(block.parameters()) for block in blocks]

    def separately() -> None:
        for block, optimizer in zip(blocks, alone, strict=True):
            step(parent, [block], optimizer, batch)

    ours, reference = [], []
    for run in range(-1, runs):  # one to warm up
        pair = cpu_seconds(lambda: step(parent, blocks, together, batch)), cpu_seconds(separately)
        if run >= 0:
            ours.append(pair[0])
            reference.append(pair[1])
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    print(f"{len(blocks)} blocks: {ours} against {reference} CPU seconds; ratio {min(ratios):.3f} to {max(ratios):.3f}")
    result = {
        "name": "bld",
        "ours": statistics.median(ours),
        "reference": statistics.median(reference),
        "ratio": statistics.median(ratios),
        "blocks": len(blocks),
        "unit": "CPU seconds",
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="timed steps of each side, taking turns")
    main(parser.parse_args().runs)
