"""Bench: leave-one-out importance against a plain forward pass of the same model on the same data.

    python scripts/bench/importance.py [--runs 9]

4 layers, hidden 256, 64 experts top-4 of intermediate 256, 8 sequences of 256 tokens, float32, one thread. Both sides
run the model's body (no head) interleaved and are timed in CPU seconds; the ratio is the median of the runs' ratios.
The reference is transformers' own forward pass with the faster of its expert implementations.
Goal: at most 1.6. Ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

import lit_puzzle.model.sink_attention  # noqa: F401  (registers it)
from lit_puzzle.importance.expert_scores import LeaveOneOut
from lit_puzzle.importance.scored_layers import score_layers

ATTENTION = "sink_attention"


def build() -> GptOssForCausalLM:
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=4,
        hidden_size=256,
        intermediate_size=256,
        num_local_experts=64,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=128,
        vocab_size=512,
        attn_implementation=ATTENTION,
    )
    return GptOssForCausalLM(config).eval()


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(runs: int) -> None:
    torch.set_num_threads(1)
    model = build()
    grouped, eager, scored_model = model, deepcopy(model), deepcopy(model)
    grouped.set_experts_implementation("grouped_mm")
    eager.set_experts_implementation("eager")
    ids_BT = torch.randint(512, (8, 256), generator=torch.Generator().manual_seed(1))
    for layer in score_layers(scored_model, LeaveOneOut(), chunk_tokens=4096):
        layer.counted_BT = torch.ones_like(ids_BT, dtype=torch.bool)

    def body(model: GptOssForCausalLM) -> Tensor:
        return model.model(input_ids=ids_BT, use_cache=False).last_hidden_state

    sides = {"ours": scored_model, "grouped_mm": grouped, "eager": eager}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        difference = float((body(scored_model) - body(eager)).abs().max())
        body(grouped)
        for run in range(runs):
            names = list(sides)
            for name in names[run % 3 :] + names[: run % 3]:  # no side always goes first
                seconds[name].append(cpu_seconds(partial(body, sides[name])))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    reference = min(("grouped_mm", "eager"), key=lambda name: median[name])
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds[reference], strict=True)]
    print(f"largest difference of the final hidden states: {difference:.1e}")
    print(f"CPU seconds: {median}; reference: {reference}; ratio per run: {min(ratios):.3f} to {max(ratios):.3f}")
    result = {
        "name": "importance",
        "ours": median["ours"],
        "reference": median[reference],
        "ratio": statistics.median(ratios),
        "unit": "CPU seconds",
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="interleaved runs")
    main(parser.parse_args().runs)
