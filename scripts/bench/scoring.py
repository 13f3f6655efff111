"""Bench: replacing one block, all metrics included, against a full forward pass of the same model on the same data.

    python scripts/bench/scoring.py [--runs 3]

24 layers (every other one with a window of 64), hidden 128, 32 experts top-4 of intermediate 128, vocabulary 2,048,
8 sequences of 128 tokens, float32, one thread. For every layer a candidate with half of the experts and, where the
attention is full, one with a window are scored; forward passes (logits included) are timed between them. CPU seconds;
the ratio is the mean over layers and candidates divided by the median forward pass, and of that the median over runs.
Goal: at most 0.65. Ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

import lit_puzzle.model.sink_attention  # noqa: F401  (registers it)
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.scoring.replace_block import ReplaceOneBlock, lay_out
from lit_puzzle.scoring.settings import Memory
from lit_puzzle.spec import BlockSpec

LAYERS, EXPERTS, WINDOW = 24, 32, 64


def build() -> GptOssPuzzleForCausalLM:
    torch.manual_seed(0)
    blocks: list[dict[str, int | None]] = [
        {"num_local_experts": EXPERTS, "sliding_window": None if layer % 2 else WINDOW} for layer in range(LAYERS)
    ]
    config = GptOssPuzzleConfig(
        num_hidden_layers=LAYERS,
        block_configs=blocks,
        hidden_size=128,
        intermediate_size=128,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=2048,
        attn_implementation="sink_attention",
        experts_implementation="grouped_mm",
    )
    return GptOssPuzzleForCausalLM(config).eval()


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def candidates(layer: int) -> list[BlockSpec]:
    """Return a candidate with half of the experts; and one with a window, where the layer has none."""
    own = None if layer % 2 else WINDOW
    half = BlockSpec(tuple(range(0, EXPERTS, 2)), own)
    return [half, BlockSpec(tuple(range(EXPERTS)), WINDOW)] if own is None else [half]


def one_run(work: ReplaceOneBlock, forward: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Return the seconds of a candidate (mean over layers), of a forward pass (median), and of advancing (sum)."""
    by_layer, forwards, advancing = [], [], 0.0
    work.start(0)
    for layer in range(LAYERS):
        advancing += cpu_seconds(partial(work.advance, layer))
        by_layer.append(statistics.mean(cpu_seconds(partial(work.quality_loss, block)) for block in candidates(layer)))
        forwards.append(cpu_seconds(forward))
    return statistics.mean(by_layer), statistics.median(forwards), advancing


def main(runs: int) -> None:
    torch.set_num_threads(1)
    model = build()
    rows = torch.randint(2048, (8, 128), generator=torch.Generator().manual_seed(1))
    work = ReplaceOneBlock(model, lay_out([rows.tolist()], 0, 1), 8, Memory(), Path("unused"), lambda tensor: tensor)

    @torch.no_grad()
    def forward() -> Tensor:
        logits: Tensor = model(input_ids=rows, use_cache=False).logits
        return logits

    forward()
    results = [one_run(work, forward) for _ in range(runs)]
    ratios = [candidate / whole for candidate, whole, _ in results]
    ours, reference = (statistics.median(column) for column in list(zip(*results, strict=True))[:2])
    advance = statistics.median(advancing / whole for _, whole, advancing in results)
    print(f"candidate {ours:.4f}, forward pass {reference:.4f} CPU seconds")
    print(f"ratio per run: {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"advancing through all layers once, for any number of candidates: {advance:.3f} forward passes")
    result = {"name": "scoring", "ours": ours, "reference": reference, "ratio": statistics.median(ratios)}
    print(json.dumps(result | {"unit": "CPU seconds", "runs": runs}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="passes over all layers")
    main(parser.parse_args().runs)
