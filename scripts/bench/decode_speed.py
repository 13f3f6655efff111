"""Bench: decode steps of two whole checkpoints in transformers on one thread, measured in turns.

    OMP_NUM_THREADS=1 python scripts/bench/decode_speed.py PARENT CHILD [--batch 32] [--context 128] [--rounds 5]

Random tokens fill the KV cache; each measured step adds one token to every row. Float32, eager attention, grouped_mm
experts, as `scripts/measure_blocks.py` times blocks. Prints the median CPU seconds of a step, their range over rounds,
and the quotient of the medians. Memory: both models and their caches.
"""

import argparse
import statistics
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lit_puzzle.costs.interleaved_timer import Work, keep_freed_memory, seconds
from lit_puzzle.model.loading import load_model


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs=2, help="folders of parent and child")
    parser.add_argument("--batch", type=int, default=32, help="rows")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache before the first step")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each model that are measured")
    return parser.parse_args()


def decoding(model: PreTrainedModel, batch: int, context: int) -> Work:
    """Return a function that makes one decode step."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (batch, context), generator=generator)
    cache = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1).past_key_values
    return lambda: model(input_ids=ids_BT[:, :1], past_key_values=cache, use_cache=True)


@torch.inference_mode()
def main() -> None:
    arguments = options()
    torch.set_num_threads(1)
    keep_freed_memory()
    models = [load_model(folder, "float32") for folder in arguments.checkpoints]
    works = [decoding(model, arguments.batch, arguments.context) for model in models]
    samples: list[list[float]] = [[], []]
    for turn in range(arguments.rounds + 1):  # the first is for warming up
        for work, taken in zip(works, samples, strict=True):
            once = seconds(work, 1, "cpu")
            taken += [once] if turn else []
    for folder, taken in zip(arguments.checkpoints, samples, strict=True):
        low, middle, high = min(taken), statistics.median(taken), max(taken)
        print(f"{folder}: {middle * 1e3:.0f} ms a step ({low * 1e3:.0f} to {high * 1e3:.0f})")
    parent, child = (statistics.median(taken) for taken in samples)
    print(f"speed-up {parent / child:.2f}")


if __name__ == "__main__":
    main()
