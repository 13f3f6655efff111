"""Bench: the search for a child of a real-shape gpt-oss on one CPU core under a budget of memory, stage by stage.

    python scripts/bench/streaming.py --folder /scratch [--layers 24] [--experts 32] [--tokens 256] [--gib 6]
                                      [--stages importance library score search assemble export] [--keep]
    python scripts/bench/streaming.py --folder /scratch --layers 4 --tokens 256 1024 \
        --stages library score_to_end calibrate_kv precompute_logits distill_blocks

Makes a gpt-oss in the shapes of the 20B model (hidden 2,880, vocabulary 201,088, MXFP4 experts; 13 GB at 24 layers) of
random weights: MXFP4 codes with scales near 2^-7, so that all values are finite. Then runs the packaged recipes of
gpt-oss-20B on it, each in a process of its own, with `memory_gib`, on sequences of random tokens. Of each stage: CPU
seconds, the largest anonymous memory of the whole process (RssAnon, sampled every 10 ms) and GiB read from the disk.
Stages that read tokens run once for each number of tokens; with two or more, the CPU seconds for 1,000 tokens are the
slope between the first and the last, and the rest does not depend on tokens. `score` compares what leaves a layer
(`scoring.depth=layer`), `score_to_end` the end of the model. A library without importance keeps random experts.
`distill_blocks` trains the candidates of layer 1, whose attention is full, an update for each sequence.
Everything below the folder is removed at the end unless `--keep` is given. Prints one JSON line for each run.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_puzzle.data.document_files import Document, write_documents
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import tensor_shapes
from lit_puzzle.model.writer import Layout, write_checkpoint
from lit_puzzle.run.folder import PACKAGE

RECIPES = PACKAGE.parent / "recipes"
CHAIN = ("importance", "library", "score", "search", "assemble", "export")
READERS = ("importance", "score", "score_to_end", "calibrate_kv", "precompute_logits", "distill_blocks")
STAGES = (*CHAIN, *READERS[2:])
SEQUENCE_TOKENS, PROMPT_TOKENS = 256, 32
SCALE, SPREAD = 120, 3  # exponents of 2^-7 and its neighbors
VOCABULARY = 201_088


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--gib", type=float, default=6.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(CHAIN))
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "parent").exists():
        seconds = time.process_time()
        make_parent(folder / "parent", arguments.layers, arguments.experts)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(PACKAGE / "assets" / "tiny_parent" / file, folder / "parent" / file)
        print(f"parent made in {time.process_time() - seconds:.0f} CPU s", flush=True)
    for stage in arguments.stages:
        counts = arguments.tokens if stage in READERS else arguments.tokens[-1:]
        if stage == "library" and not (folder / "importance").exists():
            make_importance(folder / "importance", folder / "parent")
        cpu: list[float] = []
        for tokens in counts:
            make_sequences(folder / "sequences.jsonl", tokens)
            make_documents(folder, tokens)
            shutil.rmtree(folder / stage, ignore_errors=True)
            row = measured(command(stage, folder, arguments.experts, arguments.gib, tokens))
            cpu.append(row["cpu_seconds"])
            print(json.dumps({"stage": stage, "tokens": tokens} | row), flush=True)
        if len(counts) > 1:
            slope = (cpu[-1] - cpu[0]) / (counts[-1] - counts[0])
            fixed = cpu[0] - slope * counts[0]
            found = {"cpu_seconds_per_1k_tokens": round(1000 * slope, 2), "cpu_seconds_fixed": round(fixed, 2)}
            print(json.dumps({"stage": stage} | found), flush=True)
    if not arguments.keep:
        shutil.rmtree(folder)


def gpt_oss_config(layers: int, experts: int) -> dict[str, Any]:
    """Return a config.json with the sizes of gpt-oss."""
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "num_experts_per_tok": 4}
    config: dict[str, Any] = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    config |= {"num_hidden_layers": layers, "num_local_experts": experts, **sizes, **heads}
    config |= {"max_position_embeddings": 131072, "quantization_config": {"quant_method": "mxfp4"}}
    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    config |= {"rope_theta": 150000.0, "rope_scaling": yarn | {"original_max_position_embeddings": 4096}}
    return config


def make_parent(folder: Path, layers: int, experts: int) -> None:
    """Write a checkpoint of random weights in the shapes of gpt-oss."""
    config = gpt_oss_config(layers, experts)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config, range(layers))
    layout = {
        name: ("U8" if name.endswith(("_blocks", "_scales")) else "BF16", shape) for name, shape in shapes.items()
    }
    torch.manual_seed(0)
    write_checkpoint(folder, layout, random_tensors(layout))


def random_tensors(layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yield finite values of ordinary size: norms of one, weights of 0.02, any MXFP4 code with scales near 2^-7."""
    for name, (_, shape) in layout.items():
        if name.endswith("_scales"):
            yield name, torch.randint(SCALE - SPREAD, SCALE, shape, dtype=torch.uint8)
        elif name.endswith("_blocks"):
            yield name, torch.empty(shape, dtype=torch.uint8).random_()
        elif "norm" in name:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        else:
            yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def make_sequences(file: Path, tokens: int) -> None:
    """Write sequences of random tokens, all of one length, the first of each a prompt."""
    draw, count = random.Random(0), max(2, tokens // SEQUENCE_TOKENS)
    length = tokens // count
    rows = [[draw.randrange(1000, 199_000) for _ in range(length)] for _ in range(count)]
    prompt = min(PROMPT_TOKENS, length // 2)
    file.write_text("".join(json.dumps({"input_ids": row, "prompt_tokens": prompt}) + "\n" for row in rows))


def make_documents(folder: Path, tokens: int) -> None:
    """Write the same sequences as documents of the parent."""
    rows = [json.loads(line) for line in (folder / "sequences.jsonl").read_text().splitlines()]
    shutil.rmtree(folder / "documents", ignore_errors=True)
    masks = [[0] * row["prompt_tokens"] + [1] * (len(row["input_ids"]) - row["prompt_tokens"]) for row in rows]
    documents = [Document(row["input_ids"], mask, "random", "high") for row, mask in zip(rows, masks, strict=True)]
    write_documents(folder / "documents", documents, folder / "parent")


def make_importance(folder: Path, parent: Path) -> None:
    """Write random importance."""
    checkpoint = Checkpoint(parent)
    scores = tuple(torch.rand(experts, dtype=torch.float64) for experts, _ in checkpoint.blocks)
    folder.mkdir()
    Importance(checkpoint.fingerprint(), "random", 1, scores).save(folder)


def command(stage: str, folder: Path, experts: int, gib: float, tokens: int) -> list[str]:
    """Return the command line of a stage."""
    parent, kept = folder / "parent", [experts // 4, experts // 2, experts * 3 // 4]
    settings = ("prompts=null", "documents=null", f"sequences={folder}/sequences.jsonl", "batch_size=4")
    data = tuple(f"--data.init_args.{setting}" for setting in settings)
    score = (
        f"--parent={parent}",
        f"--library={folder}/library",
        *data,
        "--evaluations=[]",
        "--fabric.accelerator=cpu",
        "--fabric.devices=1",
        f"--fabric.memory_gib={gib}",
    )
    documents = f"{folder}/documents"
    packed = (
        f"--data.init_args.documents={documents}",
        f"--data.init_args.sequence_tokens={SEQUENCE_TOKENS}",
        "--data.init_args.filter.efforts=null",
        "--data.init_args.validation_one_in=0",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.logger=false",
        f"--model.init_args.memory_gib={gib}",
    )
    given = {
        "importance": (
            f"--model.init_args.parent={parent}", f"--data.init_args.parent={parent}", *data,
            "--trainer.accelerator=cpu", "--trainer.devices=1", f"--model.init_args.memory_gib={gib}",
        ),
        "library": (
            f"--parent={parent}", f"--importance={folder}/importance", f"--experts={kept}", "--windows=[8192]",
        ),
        "score": (*score, "--scoring.depth=layer"),
        "score_to_end": score,
        "calibrate_kv": (
            f"--model.init_args.checkpoint={parent}", "--model.init_args.dtype=bfloat16",
            "--data=lit_puzzle.data.calibration.CalibrationData", f"--data.init_args.parent={parent}", *data,
            "--trainer.accelerator=cpu", "--trainer.logger=false", f"--model.init_args.memory_gib={gib}",
        ),
        "precompute_logits": (
            f"--parent={parent}", f"--documents={documents}", f"--batch_tokens={4 * SEQUENCE_TOKENS}",
            f"--chunk_tokens={SEQUENCE_TOKENS}", "--fabric.accelerator=cpu", "--fabric.devices=1",
            "--fabric.precision=bf16-true", f"--fabric.memory_gib={gib}",
        ),
        "distill_blocks": (
            f"--model.init_args.parent={parent}", f"--model.init_args.library={folder}/library",
            "--model.init_args.training.layers=[1]", *packed,
            f"--trainer.max_steps={max(2, tokens // SEQUENCE_TOKENS)}",
        ),
        "search": (
            f"--library={folder}/library", f"--scores={folder}/score", "--objective.metric=layer_error",
            "--objective.window_metric=null",
        ),
        "assemble": (f"--parent={parent}", f"--plan={folder}/search/plan.json"),
        "export": (
            f"--checkpoint={folder}/assemble/child", f"--tokenizer={PACKAGE}/assets/tiny_parent", "--kv_scales=null",
        ),
    }[stage]  # fmt: skip
    plain = stage in ("assemble", "export", "calibrate_kv", "precompute_logits")
    recipe = RECIPES / ("" if plain else "gpt_oss_20b") / f"{stage.removesuffix('_to_end')}.yaml"
    return [sys.executable, "-m", "lit_puzzle", "run", str(recipe), f"--run_dir={folder}/{stage}", *given]


def measured(words: list[str]) -> dict[str, float]:
    """Run a command; return its CPU seconds, wall seconds, and largest anonymous memory and bytes read, in GiB."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(words, env={"OMP_NUM_THREADS": "1", **os.environ}, stdout=subprocess.DEVNULL)
    watcher = threading.Thread(target=watch, args=(process.pid, found := {"anonymous": 0, "read": 0}))
    watcher.start()
    if process.wait():
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    numbers = {"cpu_seconds": cpu, "wall_seconds": time.perf_counter() - start}
    numbers |= {"anonymous_gib": found["anonymous"] / 2**30, "disk_read_gib": found["read"] / 2**30}
    return {name: round(number, 2) for name, number in numbers.items()}


def watch(pid: int, found: dict[str, int]) -> None:
    """Keep the largest anonymous memory and the last count of bytes read of a process until it ends."""
    while True:
        try:
            status, io = Path(f"/proc/{pid}/status").read_text(), Path(f"/proc/{pid}/io").read_text()
        except OSError:
            return
        if "RssAnon:" not in status:  # it has ended
            return
        found["anonymous"] = max(found["anonymous"], 1024 * int(status.split("RssAnon:")[1].split()[0]))
        found["read"] = int(io.split("read_bytes:")[1].split()[0])
        time.sleep(0.01)


if __name__ == "__main__":
    main()
