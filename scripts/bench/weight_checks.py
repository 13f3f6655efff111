"""Bench: checking weights for NaN and infinities, and their SHA-256, against copying them into memory.

    python scripts/bench/weight_checks.py [--runs 5] [--mebibytes 256]

One file of random weights, in the page cache, on one thread: copied from a map of the file; checked by
`lit_puzzle.model.values.is_finite`, as every stage does when it reads a tensor; hashed. Interleaved, CPU seconds,
medians, in bfloat16 and in float32. Ends with one JSON line of GB/s.
"""

import argparse
import hashlib
import json
import mmap
import os
import tempfile
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from lit_puzzle.costs.interleaved_timer import interleaved
from lit_puzzle.model.values import is_finite


def speeds(dtype: torch.dtype, mebibytes: int, runs: int) -> dict[str, float]:
    """Return GB/s of copying, checking and hashing weights of a dtype."""
    values = torch.randn(mebibytes * 2**20 // dtype.itemsize).mul(0.02).to(dtype)
    with tempfile.TemporaryFile() as file:
        file.write(values.view(torch.uint8).numpy().data)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        stored = torch.frombuffer(mapped, dtype=dtype)
        work = {
            "copy": stored.clone,
            "values": partial(is_finite, stored),
            "sha256": partial(hashlib.sha256, mapped),
        }
        seconds = interleaved([partial(lambda piece: piece, piece) for piece in work.values()], "cpu", runs)
    return {name: round(mebibytes * 2**20 / time / 1e9, 2) for name, time in zip(work, seconds, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    found = {name: speeds(dtype, arguments.mebibytes, arguments.runs) for name, dtype in dtypes.items()}
    for name, row in found.items():
        print(f"{name}: {row} GB/s; checking takes {row['copy'] / row['values']:.2f} of the time of copying")
    print(json.dumps({"name": "weight_checks", "unit": "GB/s", **found}))


if __name__ == "__main__":
    main()
