"""Time the blocks of a model shape on this machine, for `lit_puzzle.costs.timed_blocks.TimedBlocks`.

    python scripts/measure_blocks.py --config DIR/config.json --out FILE [--experts 16 12 8] [--windows 16 none]
        [--batches 1 8 32] [--contexts 64 128 256] [--prompts 64 128 256] [--whole-model]

Reads the `config.json` of a parent or child, no weights: they are random. Writes the JSON table FILE, with the machine,
versions, dtype, model shape and command that made it. Runs on the GPU where there is one (bfloat16), else on one thread
of the CPU (float32). `--whole-model` also times decode steps of the whole model of the config and prints them beside
the table's prediction. Memory: see `lit_puzzle.costs.block_timing`; disk: about 110 bytes a point.
"""

import argparse
import dataclasses
import os
import platform
import shlex
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from lit_puzzle.costs.block_timing import Bench, Row, measure
from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.gpus import gpus
from lit_puzzle.costs.interleaved_timer import keep_freed_memory
from lit_puzzle.costs.machine import Machine, Points
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Deployment, Setting, parent_blocks
from lit_puzzle.costs.timed_blocks import TimedBlocks, shape_fingerprint
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.spec import Scenario


def window(text: str) -> int | None:
    return None if text == "none" else int(text)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config.json of the parent or of a child")
    parser.add_argument("--out", type=Path, required=True, help="the table")
    parser.add_argument("--experts", type=int, nargs="+", help="expert counts (those of the config)")
    parser.add_argument("--windows", type=window, nargs="+", help="windows, none is full attention (the config's)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences of a decode step")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 128, 256], help="tokens in the cache")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 128, 256], help="tokens of a prompt")
    parser.add_argument("--whole-model", action="store_true", help="also time decode steps of the config's model")
    parser.add_argument("--gpu", help="the device's name in scenarios; default: the one of gpus.json that this is")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on CPU, bfloat16 on GPU")
    parser.add_argument("--attention", default="eager", help="attention implementation")
    parser.add_argument("--expert-kernels", default="grouped_mm", help="experts implementation")
    parser.add_argument("--copies", type=int, default=4, help="layers run one after the other, for cold caches")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of every point")
    return parser.parse_args()


def device_name(device: str) -> str:
    """Return the key of gpus.json for this machine's device.

    Raises:
        ValueError: gpus.json has no such device.
    """
    if device == "cpu":
        return "cpu"
    full = torch.cuda.get_device_name()
    found = [name for name in gpus() if name in full]
    if not found:
        raise ValueError(f"{full} is none of {sorted(gpus())}. Name it with --gpu and add it to gpus.json.")
    return found[0]


def processor() -> str:
    """Return the processor's name, on Linux from /proc/cpuinfo."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def header(arguments: argparse.Namespace, machine: Machine, points: Points, model: ModelShape) -> dict[str, Any]:
    """Return the table without its rows; the command names every axis, so that it can be run again with more values."""
    axes = dataclasses.asdict(points)
    words = [f"python scripts/measure_blocks.py --config {shlex.quote(str(arguments.config))}"]
    words += [f"--{name} {' '.join('none' if v is None else str(v) for v in values)}" for name, values in axes.items()]
    words += ["--whole-model"] if arguments.whole_model else []
    words += [f"--attention {machine.attention} --expert-kernels {machine.experts} --copies {machine.copies}"]
    words += [f"--rounds {machine.rounds} --out {shlex.quote(str(arguments.out))}"]
    gpu, dtype = arguments.gpu or device_name(machine.device), str(machine.dtype).removeprefix("torch.")
    words += [f"--gpu {shlex.quote(gpu)} --dtype {dtype}"]
    full_name = processor() if machine.device == "cpu" else torch.cuda.get_device_name()
    return {
        "gpu": gpu,
        "dtype": dtype,
        "model": model.to_json(),
        "fingerprint": shape_fingerprint(model),
        "command": " ".join(words),
        "hardware": {"device": full_name, "machine": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
        "settings": {"attention": machine.attention, "experts": machine.experts, "copies": machine.copies}
        | {"rounds": machine.rounds, "clock": "process time" if machine.device == "cpu" else "CUDA events"},
    }


def predict(times: TimedBlocks, config: dict[str, Any], row: Row) -> float:
    """Return the seconds of a whole decode step as the sum of the table's parts."""
    batch, context = int(row["batch_size"] or 0), int(row["context_tokens"] or 0)
    dtype = times.header["dtype"]
    scenario = Scenario(times.header["gpu"], 1, context - 1, 1, batch, dtype, 1, 1, dtype, dtype)
    setting = Setting(times.model, scenario, Deployment(1, 1, 1), ServingEngine())
    layers = sum(times.decode_layer(setting, block, batch, context) for block in parent_blocks(config))
    return layers + times.decode_rest(setting, batch)


def main() -> None:
    arguments = options()
    if not arguments.config.is_file():
        raise ValueError(f"{arguments.config} is not a file. Give the config.json of a checkpoint folder.")
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    config = read_json(arguments.config)
    blocks = parent_blocks(config)
    points = Points(
        experts=arguments.experts or sorted({block.num_experts for block in blocks}),
        windows=arguments.windows or list(dict.fromkeys(block.window_tokens for block in blocks)),
        batches=arguments.batches,
        contexts=arguments.contexts,
        prompts=arguments.prompts,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    machine = Machine(device, dtype, arguments.attention, arguments.expert_kernels, arguments.copies, arguments.rounds)
    table = header(arguments, machine, points, ModelShape.from_config(config))
    start = time.perf_counter()
    table |= measure(Bench(config, machine), points, arguments.whole_model)
    write_json(arguments.out, table)
    times = TimedBlocks(arguments.out)
    print(f"{arguments.out}: {sum(len(table[kind]) for kind in times.grids)} points on {table['hardware']['device']}")
    for row in table["whole_model"]:
        predicted, measured = predict(times, config, row), row["seconds"]
        print(
            f"batch {row['batch_size']:4d} context {row['context_tokens']:6d}: measured {measured * 1e3:8.3f} ms, "
            f"predicted {predicted * 1e3:8.3f} ms, {predicted / measured - 1:+.1%}"
        )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
