"""Bench: loading MXFP4 layers in the shapes of gpt-oss-20B, dequantized to bfloat16 and sharded over processes (FSDP2).

    python scripts/bench/loading.py --parent /scratch/parent [--processes 1 2 4]

The parent is one that `scripts/bench/streaming.py --layers N --keep` has made. Of each number of processes (gloo): CPU
seconds of the load summed over them, also as a multiple of one process, which loads the model whole; and the largest
anonymous memory of a process (RssAnon, sampled every 5 ms, above what it was before), against its share + one layer.
Ends with one JSON line for each number of processes.
"""

import argparse
import json
import math
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import layer_shapes, tensor_shapes
from lit_puzzle.training.sharding import load_for, shard


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    whole, layer = model_bytes(arguments.parent)
    alone = 0.0
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as scratch:
            multiprocessing.spawn(load, (processes, arguments.parent, Path(scratch)), nprocs=processes)
            found = [json.loads((Path(scratch) / str(rank)).read_text()) for rank in range(processes)]
        seconds = sum(one["cpu_seconds"] for one in found)
        alone = alone or seconds / processes
        line = {
            "processes": processes,
            "model_gib": whole / 2**30,
            "layer_gib": layer / 2**30,
            "cpu_seconds": seconds,
            "of_one_process": seconds / alone,
            "peak_gib": max(one["peak"] for one in found) / 2**30,
            "share_and_layer_gib": (whole / processes + (layer if processes > 1 else 0)) / 2**30,
        }
        print(json.dumps({name: round(value, 3) for name, value in line.items()}), flush=True)


def model_bytes(folder: Path) -> tuple[int, int]:
    """Return the bytes of the model in bfloat16, and of its largest layer."""
    checkpoint = Checkpoint(folder)
    layers = [layer_shapes(checkpoint.config, experts, mxfp4=False) for experts, _ in checkpoint.blocks]
    whole = tensor_shapes(checkpoint.config, ())
    return 2 * sum(map(math.prod, whole.values())), 2 * max(sum(map(math.prod, one.values())) for one in layers)


def load(rank: int, processes: int, folder: Path, scratch: Path) -> None:
    """Load the model in one of some processes and write its CPU seconds and peak."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/meet", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    before, peak, done = anonymous_bytes(), [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, done))
    watcher.start()
    start = time.process_time()
    model, waiting = load_for(mesh, folder, "bfloat16", "sink_attention")
    model.requires_grad_(False)
    shard(model, model.model.layers, mesh, waiting)
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    (scratch / str(rank)).write_text(json.dumps({"cpu_seconds": seconds, "peak": peak[0] - before}))
    torch.distributed.destroy_process_group()


def watch(peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous_bytes())


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
