"""Bench: the distillation loss in chunks against the plain formula, at the vocabulary of gpt-oss: memory and time.

    python scripts/bench/kd_loss.py [--tokens 4096] [--naive_tokens 512] [--runs 5] [--divergence forward_kl]

Vocabulary 201,088, hidden 512, float32, one thread, a head that trains. Every side runs in processes of its own, one
after the other: peak is the largest RssAnon (sampled every 2 ms) over that before the loss, and so holds logits,
gradients and every temporary. The plain formula needs about 16 GB at 4,096 tokens: it is measured at --naive_tokens
and at half of that and continued on the straight line through both; --naive_tokens=4096 measures it there where memory
allows. Times are CPU seconds of --naive_tokens tokens on every side. `trl` is the chunked divergence of TRL with
chunks of 256 x 16384. Goals: memory_ratio at most 0.15, time_ratio at most 1.2. Ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from lit_puzzle.distill.losses import FullLogits, divergence, head_loss
from lit_puzzle.distill.settings import LossSettings

VOCABULARY, HIDDEN = 201_088, 512
Inputs = tuple[Tensor, Tensor, FullLogits]


def make_inputs(tokens: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    head_VD = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5).requires_grad_()
    with torch.no_grad():
        parent = FullLogits(hidden_ND + 0.3 * torch.randn(tokens, HIDDEN, generator=generator), head_VD.detach())
    return hidden_ND, head_VD, parent


def naive(inputs: Inputs, settings: LossSettings) -> Tensor:
    hidden_ND, head_VD, parent = inputs
    log_q_NV = (hidden_ND @ head_VD.t()).log_softmax(-1)
    log_p_NV = (parent.hidden_NP @ parent.head_VP.t()).log_softmax(-1)
    return divergence(log_q_NV, log_p_NV, settings).sum()


def ours(inputs: Inputs, settings: LossSettings) -> Tensor:
    hidden_ND, head_VD, parent = inputs
    return head_loss(hidden_ND, head_VD, parent, torch.zeros(len(hidden_ND), dtype=torch.long), settings).loss


def trl(inputs: Inputs, settings: LossSettings) -> Tensor:
    from trl.kernels import chunked_divergence

    chunked_divergence.TOKEN_CHUNK_SIZE, chunked_divergence.VOCAB_CHUNK_SIZE = 256, 16384
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": settings.beta}[settings.divergence]
    hidden_ND, head_VD, parent = inputs
    apply = chunked_divergence.ChunkedDivergenceFunction.apply
    return apply(hidden_ND, head_VD, None, parent.hidden_NP, parent.head_VP, None, beta)[0].sum()


SIDES: dict[str, Callable[[Inputs, LossSettings], Tensor]] = {"naive": naive, "ours": ours, "trl": trl}


class Peak:
    """The largest anonymous memory of this process, sampled by a thread, over what it was at the beginning."""

    def __enter__(self) -> "Peak":
        self.start = self.highest = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.highest = max(self.highest, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = self.highest - self.start


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(side: str, tokens: int, runs: int, settings: LossSettings) -> dict[str, Any]:
    """Loss and backward of one side, once for memory and `runs` times for CPU seconds."""
    torch.set_num_threads(1)
    inputs = make_inputs(tokens)

    def work() -> None:
        inputs[0].grad = inputs[1].grad = None
        SIDES[side](inputs, settings).backward()

    with Peak() as peak:
        work()
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return {"bytes": peak.bytes, "seconds": seconds}


def in_process(side: str, tokens: int, runs: int, divergence: str, chunk_tokens: int) -> dict[str, Any]:
    words = ["--side", side, "--tokens", str(tokens), "--runs", str(runs), "--divergence", divergence]
    command = [sys.executable, __file__, *words, "--chunk_tokens", str(chunk_tokens)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(arguments: argparse.Namespace) -> None:
    common = (arguments.divergence, arguments.chunk_tokens)
    half, shared = arguments.naive_tokens // 2, arguments.naive_tokens
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    at_shared: dict[str, int] = {}
    for _ in range(arguments.runs):  # the sides take turns, so that a busy machine disturbs all alike
        for side in SIDES:
            measured = in_process(side, shared, 1, *common)
            seconds[side] += measured["seconds"]
            at_shared[side] = max(at_shared.get(side, 0), measured["bytes"])
    slope = (at_shared["naive"] - in_process("naive", half, 0, *common)["bytes"]) / (shared - half)
    peak = {"ours": in_process("ours", arguments.tokens, 0, *common)["bytes"]}
    peak["naive"] = int(at_shared["naive"] + slope * (arguments.tokens - shared))
    median = {side: statistics.median(times) for side, times in seconds.items()}
    print(f"peak at {arguments.tokens} tokens, GiB: { {side: round(size / 2**30, 2) for side, size in peak.items()} }")
    print(f"peak at {shared} tokens, GiB: { {side: round(size / 2**30, 2) for side, size in at_shared.items()} }")
    print(f"CPU seconds at {shared} tokens: {median}; trl over naive {median['trl'] / median['naive']:.2f}")
    result = {
        "name": "kd_loss",
        "divergence": arguments.divergence,
        "tokens": arguments.tokens,
        "vocabulary": VOCABULARY,
        "chunk_tokens": arguments.chunk_tokens,
        "ours": median["ours"],
        "reference": median["naive"],
        "time_ratio": median["ours"] / median["naive"],
        "memory_ratio": peak["ours"] / peak["naive"],
        "trl_time_ratio": median["trl"] / median["naive"],
        "unit": f"CPU seconds at {shared} tokens",
        "runs": arguments.runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens at which memory is compared")
    parser.add_argument("--naive_tokens", type=int, default=512, help="most tokens for the plain formula")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side, taking turns")
    parser.add_argument("--divergence", default="forward_kl", choices=["forward_kl", "reverse_kl", "jsd"])
    parser.add_argument("--chunk_tokens", type=int, default=LossSettings().chunk_tokens, help="of our side")
    parser.add_argument("--side", choices=list(SIDES), help="measure one side in this process (used by this script)")
    chosen = parser.parse_args()
    if chosen.side:
        settings = LossSettings(divergence=chosen.divergence, chunk_tokens=chosen.chunk_tokens)
        print(json.dumps(measure(chosen.side, chosen.tokens, chosen.runs, settings)))
    else:
        main(chosen)
