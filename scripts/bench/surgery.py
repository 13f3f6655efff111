"""Bench: assembling and exporting a child against `cp` of the same bytes, on a 20B-shaped MXFP4 parent of random bytes.

    python scripts/bench/surgery.py [--stage assemble|export] [--layers 24] [--rounds 3]

assemble: 24 of 32 experts are kept in every layer, drawn at random; `cp` copies the child's files. export: the parent
itself, with KV scales, all experts as they are stored; `cp` copies the parent's files, which are the same bytes, and
export hashes them too. Both sides read a source that is not in the page cache, write new files, and end with fsync;
rounds are interleaved with alternating order, seconds are wall-clock time. `sha256sum` of the exported folder is timed
separately, for comparison. Needs disk for the parent (13 GB at 24 layers) and for two outputs; all of it is removed
afterwards. Goals: ratio at most 1.5, at most 1 GiB of anonymous memory. Ends with one JSON line.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_puzzle.child.assemble import assemble
from lit_puzzle.kv_cache.scales import KVScales, LayerScales, TensorScale
from lit_puzzle.model.checkpoint import fingerprint, weight_files
from lit_puzzle.model.layout import tensor_shapes
from lit_puzzle.model.writer import Layout, write_checkpoint
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.serve.export import FOLDER, export
from lit_puzzle.spec import BlockSpec, Plan

EXPERTS, KEPT = 32, 24


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", choices=("assemble", "export"), default="assemble")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the system's scratch folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        measure(Path(scratch), arguments.stage, arguments.layers, arguments.rounds)


def measure(folder: Path, stage: str, layers: int, rounds: int) -> None:
    parent, run = folder / "parent", folder / "run"
    make_parent(parent, layers)
    if stage == "assemble":
        plan, output = folder / "plan.json", run / "child"
        Plan(fingerprint(parent), EXPERTS, random_blocks(layers)).save(plan)
        copied = output
        work = lambda: assemble(run, parent, plan=plan)  # noqa: E731
    else:
        scales, output, copied = folder / "scales", run / FOLDER, parent
        make_scales(scales, parent, layers)
        words = PACKAGE / "assets" / "tiny_parent"
        work = lambda: export(run, parent, kv_scales=scales, tokenizer=words)  # noqa: E731
    seconds: dict[str, list[float]] = {stage: [], "cp": []}
    peaks = []
    for turn in range(rounds):
        for side in (stage, "cp") if turn % 2 == 0 or stage == "assemble" else ("cp", stage):
            shutil.rmtree(run if side == stage else folder / "copy", ignore_errors=True)
            before = anonymous_bytes()
            with Peak() as peak:
                if side == stage:
                    seconds[side].append(timed(parent, work))
                    peaks.append(peak.bytes - before)
                else:
                    seconds[side].append(timed(copied, lambda: copy(copied, folder / "copy")))
        print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    report(stage, seconds, sum(path.stat().st_size for path in weight_files(output)), max(peaks))
    if stage == "export":
        start = time.perf_counter()
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=output, check=True)
        print(f"sha256sum --check of the output, apart: {time.perf_counter() - start:.2f} s")


def report(stage: str, seconds: dict[str, list[float]], num_bytes: int, anonymous: int) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:<9} {medians[name]:6.2f} s of {[round(value, 2) for value in values]}")
    paired = statistics.median(ours / cp for ours, cp in zip(seconds[stage], seconds["cp"], strict=True))
    line = {"gigabytes": num_bytes / 1e9, **medians, "ratio": medians[stage] / medians["cp"], "paired_ratio": paired}
    print(json.dumps(line | {"anonymous_gib": anonymous / 2**30}))


def make_scales(folder: Path, parent: Path, layers: int) -> None:
    def one() -> TensorScale:
        return TensorScale(torch.tensor(1.0), torch.tensor(2.0**-8), 0)

    made_up = tuple(LayerScales(one(), one()) for _ in range(layers))
    KVScales(fingerprint(parent), "gpt_oss", "amax", "power_of_two", 1, made_up).save(folder)


def make_parent(folder: Path, layers: int) -> None:
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "vocab_size": 201088}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "num_experts_per_tok": 4}
    config = {"model_type": "gpt_oss", "num_hidden_layers": layers, "num_local_experts": EXPERTS, **sizes, **heads}
    config["max_position_embeddings"] = 131072
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config, range(layers))
    layout = {
        name: ("U8" if name.endswith(("_blocks", "_scales")) else "BF16", shape) for name, shape in shapes.items()
    }
    write_checkpoint(folder, layout, random_tensors(layout))


def random_tensors(layout: Layout) -> Iterator[tuple[str, Tensor]]:
    for name, (code, shape) in layout.items():
        if code == "U8":
            yield name, torch.empty(shape, dtype=torch.uint8).random_()
        else:
            yield name, torch.empty(shape, dtype=torch.int16).random_().view(torch.bfloat16)


def random_blocks(layers: int) -> tuple[BlockSpec, ...]:
    draw = random.Random(0)
    kept = [tuple(sorted(draw.sample(range(EXPERTS), KEPT))) for _ in range(layers)]
    return tuple(BlockSpec(experts, None if layer % 2 else 128) for layer, experts in enumerate(kept))


def timed(source: Path, work: Callable[[], object]) -> float:
    for path in weight_files(source):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    subprocess.run(["cp", *weight_files(source), target], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Peak:
    """Largest anonymous memory of this process while the block runs, sampled every 5 ms."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())


if __name__ == "__main__":
    main()
