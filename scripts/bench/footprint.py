"""Bench: the formulas of `--plan` against measured peaks of every stage, at three sizes, with one and two processes.

    python scripts/bench/footprint.py [--stages importance distill ...] [--processes 1 2] [--sizes 0 1 2] [--keep DIR]

Makes random parents of 4, 6 and 8 layers, data for them, and runs each stage's own recipe on CPU processes (gloo).
Measured is anonymous memory (RssAnon): pages of files do not count. A process of its own reads it every 2 ms, above what
it was when everything was imported; freed memory returns to the system at once (M_MMAP_THRESHOLD), no huge pages.
Prints a row for each run, and one JSON line at the end.
"""

import argparse
import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
LAYERS, MIB = (4, 6, 8), 2**20
PROMPT_TOKENS = 75
TWO_PROCESSES = ("importance", "calibrate_kv", "score", "precompute_logits", "distill_blocks", "distill", "rl_recover")
SHAPE = {
    **{"hidden_size": 256, "intermediate_size": 192, "num_local_experts": 16, "num_experts_per_tok": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096},
    **{"sliding_window": 128, "max_position_embeddings": 65536},
}


def stages(folder: Path, size: int, processes: int) -> dict[str, tuple[str, list[str]]]:
    """Recipe and overrides of every stage at a size; the numbers grow fourfold from the first size to the last."""
    models, tokens = folder / f"{LAYERS[size]}_layers", 2048 * 2**size
    parent, library, documents = (str(models / name) for name in ("parent", "library", "documents"))
    devices = [f"--trainer.devices={processes}", "--trainer.accelerator=cpu"]
    fabric = [f"--fabric.devices={processes}", "--fabric.accelerator=cpu"]
    data = [
        "--data.init_args.prompts=null",
        f"--data.init_args.sequences={models / f'sequences_{tokens}.jsonl'}",
        f"--data.init_args.parent={parent}",
        "--data.init_args.batch_size=2",
    ]
    packed = [
        f"--data.init_args.documents={documents}",
        f"--data.init_args.parent={parent}",
        f"--data.init_args.sequence_tokens={tokens}",
        "--data.init_args.validation_one_in=4",
        "--data.init_args.batch_size=1",
    ]
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.callbacks=[]"]
    rows = 16 * 2**size
    drawn = ["--sampling.max_new_tokens=64", "--engine.name=transformers", f"--engine.batch_size={2 * rows}"]
    model = "--model.init_args"
    return {
        "importance": ("importance", [f"{model}.parent={parent}", *devices, *data]),
        "calibrate_kv": ("calibrate_kv", [f"{model}.checkpoint={parent}", *devices, *data]),
        "score": ("score", [f"--parent={parent}", f"--library={library}", "--evaluations=[]", *fabric, *data]),
        "precompute_logits": (
            "precompute_logits",
            [f"--parent={parent}", f"--documents={documents}", f"--batch_tokens={2 * tokens}", *fabric],
        ),
        "distill_blocks": (
            "distill_blocks",
            [f"{model}.parent={parent}", f"{model}.library={library}", *devices, *packed, *short],
        ),
        "distill": (
            "distill",
            [f"{model}.child={parent}", f"{model}.parent={parent}", f"{model}.evaluation=null", *devices, *packed, *short],
        ),
        "distill_checkpointed": (
            "distill",
            [f"{model}.child={parent}", f"{model}.parent={parent}", f"{model}.evaluation=null", *devices, *packed, *short]
            + [f"{model}.training.gradient_checkpointing=true", f"{model}.loss.hidden=0.0"],
        ),
        "rl_recover": (
            "rl_recover",
            [f"{model}.child={parent}", f"{model}.grpo.completions_per_device={rows}", *devices, "--trainer.max_steps=1"]
            + [f"{model}.grpo.sampling.max_new_tokens=64", f"{model}.evaluation.prompts_per_effort=2"]
            + ["--trainer.callbacks=[]", "--trainer.val_check_interval=1", "--data.init_args.held_out_per_effort=2"]
            + [f"{model}.training.lora=null", "--data.init_args.train_prompts=64"],
        ),
        "generate": ("generate", [f"--parent={parent}", f"--prompts.num_prompts={2 * rows}", *drawn]),
        "evaluate": ("evaluate", [f"--checkpoint={parent}", f"--held_out.prompts_per_effort={2 * rows}", *drawn]),
    }


MODULES = {
    "rl_recover": ["lit_puzzle.rl.module", "lit_puzzle.rl.trl_engine", "lit_puzzle.data.rl_prompts", "peft"],
    "distill": ["lit_puzzle.distill.global_kd", "lit_puzzle.data.documents"],
    "distill_blocks": ["lit_puzzle.distill.blocks", "lit_puzzle.data.documents"],
    "importance": ["lit_puzzle.importance.importance", "lit_puzzle.data.calibration"],
    "calibrate_kv": ["lit_puzzle.kv_cache.calibrate", "lit_puzzle.data.calibration", "matplotlib.pyplot"],
    "score": ["lit_puzzle.scoring.scoring"],
    "precompute_logits": ["lit_puzzle.distill.top_logits"],
    "generate": ["lit_puzzle.data.generate"],
    "evaluate": ["lit_puzzle.evaluate.accuracy"],
}


def make_models(folder: Path, size: int) -> None:
    """Write a random parent, sequences, documents and a library."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from lit_puzzle.data.document_files import Document, write_documents
    from lit_puzzle.importance.importance_file import Importance
    from lit_puzzle.library.candidates import library
    from lit_puzzle.model.checkpoint import fingerprint
    from lit_puzzle.tiny.tokenizer import build_tokenizer

    models, layers, tokens = folder / f"{LAYERS[size]}_layers", LAYERS[size], 2048 * 2**size
    tokenizer = build_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    GptOssForCausalLM(GptOssConfig(num_hidden_layers=layers, **SHAPE, **ends)).save_pretrained(models / "parent")
    tokenizer.save_pretrained(models / "parent")
    rows = torch.randint(8, 110, (8, tokens)).tolist()
    lines = [json.dumps({"input_ids": row}) + "\n" for row in rows]
    (models / f"sequences_{tokens}.jsonl").write_text("".join(lines))
    written = [Document(row, [0] * 8 + [1] * (tokens - 8), "random", "high") for row in [*rows] * 4]
    for number, document in enumerate(written):
        document.input_ids[:8] = [8 + number + place for place in range(8)]  # prompts differ: both splits get some
    write_documents(models / "documents", written, models / "parent")
    scores = tuple(torch.rand(SHAPE["num_local_experts"], dtype=torch.float64) for _ in range(layers))
    (models / "importance").mkdir()
    Importance(fingerprint(models / "parent"), "random", 1, scores).save(models / "importance")
    (models / "library").mkdir()
    library(models / "library", models / "parent", models / "importance", [8], [64])


def run_one(stage: str, out: Path, words: list[str]) -> None:
    """Run a recipe in this process, after everything is imported and this process's number is written."""
    allocator = ctypes.CDLL(None)
    allocator.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    allocator.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    import torch

    from lit_puzzle.cli import main

    for name in ["lit_puzzle.training.lightning", *MODULES[stage]]:
        importlib.import_module(name)
    torch.set_num_threads(1)
    small = torch.nn.Linear(64, 64)
    small(torch.ones(2, 64)).sum().backward()  # starts the threads of autograd
    allocator.malloc_trim(0)
    rank = os.environ.get("LOCAL_RANK", "0")
    (out / f"{rank}.pid.tmp").write_text(str(os.getpid()))
    (out / f"{rank}.pid.tmp").rename(out / f"{rank}.pid")
    time.sleep(0.05)  # the observer reads what importing took
    main(["run", *words])


def anonymous(pid: int) -> int:
    """Anonymous bytes of a process, or 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(status.split("RssAnon:")[1].split()[0]) if "RssAnon:" in status else 0


def observe(process: subprocess.Popen[bytes], out: Path) -> list[int]:
    """Peak of each process above what it was when it had imported everything."""
    base: dict[int, int] = {}
    peak: dict[int, int] = {}
    while process.poll() is None:
        if len(base) < 2:
            for file in out.glob("*.pid"):
                pid = int(file.read_text())
                base.setdefault(pid, anonymous(pid))
        for pid in base:
            peak[pid] = max(peak.get(pid, 0), anonymous(pid))
        time.sleep(0.002)
    return [peak[pid] - base[pid] for pid in base]


def measured(folder: Path, stage: str, size: int, processes: int) -> tuple[float, str]:
    """Largest peak of the processes of one run, in bytes, and the end of what it printed where it failed."""
    recipe, words = stages(folder, size, processes)[stage]
    out = Path(tempfile.mkdtemp(dir=folder))
    run = [f"recipes/{recipe}.yaml", f"--run_dir={out / 'run'}", "--force", *words]
    command = [sys.executable, str(HERE), "--one", recipe, "--out", str(out), "--", *run]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = (out / "log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    peaks = observe(process, out)
    ended = "" if process.returncode == 0 else (out / "log").read_text()[-1500:]
    return float(max(peaks, default=0)), ended


def predicted(folder: Path, stage: str, size: int, processes: int) -> tuple[float, str]:
    """Peak by the formulas, and the phase that it is in."""
    from lit_puzzle.cli import _target
    from lit_puzzle.footprint.plan import make_plan
    from lit_puzzle.run.recipe import load_recipe

    name, words = stages(folder, size, processes)[stage]
    recipe = load_recipe(f"recipes/{name}.yaml")
    command = recipe.value("command")
    options = [f"--gpus={processes}", "--gpu=cpu", f"--prompt_tokens={PROMPT_TOKENS}"]
    plan = make_plan(recipe, command, _target(command), [*words, *options])
    assert plan is not None
    return plan.footprint.peak_bytes, plan.footprint.fullest.name


def main(chosen: argparse.Namespace) -> None:
    """Measure, compare, print."""
    folder = Path(chosen.keep or tempfile.mkdtemp(prefix="footprint"))
    folder.mkdir(exist_ok=True)
    rows = []
    print("| stage | processes | layers | predicted MiB | measured MiB | error | fullest |\n|---|---|---|---|---|---|---|")
    for size in chosen.sizes:
        if not (folder / f"{LAYERS[size]}_layers" / "library" / "library.json").is_file():
            make = [sys.executable, str(HERE), "--make", str(size), "--out", str(folder)]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    for stage in chosen.stages or list(stages(folder, 0, 1)):
        for processes in chosen.processes:
            if processes == 2 and stage not in TWO_PROCESSES:
                continue
            for size in chosen.sizes:
                expected, phase = predicted(folder, stage, size, processes)
                found, failure = measured(folder, stage, size, processes)
                error = expected / found - 1 if found else float("nan")
                where = f"{expected / MIB:.0f} | {found / MIB:.0f} | {100 * error:+.1f}%"
                print(f"| {stage} | {processes} | {LAYERS[size]} | {where} | {phase} |", flush=True)
                if failure:
                    print(failure, file=sys.stderr, flush=True)
                rows.append([stage, processes, LAYERS[size], round(expected), round(found)])
    print(json.dumps({"name": "footprint", "rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", help="default: all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 1, 2], help="of three")
    parser.add_argument("--keep", help="folder for the models, which a second bench finds there")
    parser.add_argument("--one", help="one run in this process (used by this script)")
    parser.add_argument("--make", type=int, help="models of a size (used by this script)")
    parser.add_argument("--out", type=Path, help="where that writes")
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    if given.one:
        run_one(given.one, given.out, given.words)
    elif given.make is not None:
        make_models(given.out, given.make)
    else:
        main(given)
