"""Bench: memory of a distillation step against the length of the sequence: a straight line, not a square.

    python scripts/bench/kd_memory.py [--lengths 2048 8192 32768] [--hidden 1.0]

The embedded tiny parent and child, one sequence that is one document, float32, one thread, loss and gradients of one
step; with and without activation checkpointing, each in a process of its own. Peak is the process's largest resident
memory over that before the step. Ends with one JSON line: MiB, and bytes per token from each length to the next (equal
on a line).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from kd import training_pair

from lit_puzzle.distill.distillation_loss import distillation_loss
from lit_puzzle.distill.settings import LossSettings


def step(length: int, hidden: float, checkpointing: bool) -> None:
    """One step, after a short one that has loaded all that a step loads."""
    torch.set_num_threads(1)
    parent, child = training_pair(checkpointing)
    for tokens in (64, length):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        ids_BT = torch.randint(3, 110, (1, tokens), generator=torch.Generator().manual_seed(0))
        positions_BT = torch.arange(tokens)[None]
        batch = {"input_ids": ids_BT, "position_ids": positions_BT, "document_ids": 0 * ids_BT}
        batch["loss_mask"] = positions_BT > 0
        distillation_loss(child, parent, batch, LossSettings(hidden=hidden)).loss.backward()
    seconds = time.process_time() - start
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before * 1024, seconds]))


def main(lengths: list[int], hidden: float) -> None:
    result: dict[str, object] = {"name": "kd_memory", "lengths": lengths, "hidden": hidden}
    for checkpointing in (False, True):
        peaks = []
        for length in lengths:
            words = ["--step", str(length), "--hidden", str(hidden)] + ["--checkpointing"] * checkpointing
            done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
            peak, seconds = json.loads(done.stdout.splitlines()[-1])
            peaks.append(peak)
            print(f"{length} tokens, checkpointing {checkpointing}: {peak / 2**20:.0f} MiB, {seconds:.1f} CPU seconds")
        steps = zip(peaks, lengths, peaks[1:], lengths[1:])
        name = "checkpointed" if checkpointing else "plain"
        result[f"{name}_mib"] = [round(peak / 2**20) for peak in peaks]
        result[f"{name}_bytes_per_token"] = [round((b - a) / (to - start)) for a, start, b, to in steps]
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens of the sequence")
    parser.add_argument("--hidden", type=float, default=1.0, help="weight of the distance of hidden states")
    parser.add_argument("--step", type=int, help="one step in this process (used by this script)")
    parser.add_argument("--checkpointing", action="store_true", help="of that step")
    chosen = parser.parse_args()
    if chosen.step:
        step(chosen.step, chosen.hidden, chosen.checkpointing)
    else:
        main(chosen.lengths, chosen.hidden)
