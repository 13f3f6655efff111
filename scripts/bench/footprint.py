"""Bench: the formulas of `--plan` against measured peaks of every stage, at three sizes, with one and two processes.

    python scripts/bench/footprint.py [--stages importance distill ...] [--processes 1 2] [--sizes 0 1 2] [--keep DIR]

Makes random parents of 4, 6 and 8 layers, data for them, and runs each stage's own recipe on CPU processes (gloo).
Measured is anonymous memory (RssAnon): pages of files do not count. Every run is a fork of a process that has imported
all; it is read every 2 ms, above what it was then. Freed memory returns to the system at once (M_MMAP_THRESHOLD), and
there are no huge pages. Prints a row for each run, and one JSON line at the end.
"""

import argparse
import ctypes
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
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
    models, tokens = folder / f"{LAYERS[size]}_layers", 1024 * 2**size
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
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.callbacks=[]"]
    rows = 8 * 2**size
    drawn = ["--sampling.max_new_tokens=64", "--engine.name=transformers", f"--engine.batch_size={2 * rows}"]
    wide = [f"--batch_tokens={2 * tokens}"]
    model = "--model.init_args"
    child = [f"{model}.child={parent}", f"{model}.parent={parent}", f"{model}.evaluation=null", *devices, *packed]
    checkpointed = [f"{model}.training.gradient_checkpointing=true", f"{model}.loss.hidden=0.0"]
    rollouts = [f"{model}.grpo.completions_per_device={rows}", f"{model}.grpo.sampling.max_new_tokens=64"]
    rollouts += [f"{model}.rewards.budget.weight=0"]  # nobody has measured the parent's lengths
    prompts = [f"{model}.evaluation.prompts_per_effort=2", "--data.init_args.held_out_per_effort=2"]
    whole = [f"{model}.child={parent}", f"{model}.training.lora=null", "--data.init_args.train_prompts=64"]
    blocks = [f"{model}.parent={parent}", f"{model}.library={library}"]
    return {
        "importance": ("importance", [f"{model}.parent={parent}", *devices, *data]),
        "calibrate_kv": ("calibrate_kv", [f"{model}.checkpoint={parent}", *devices, *data]),
        "score": ("score", [f"--parent={parent}", f"--library={library}", "--evaluations=[]", *fabric, *data]),
        "precompute_logits": ("precompute_logits", [f"--parent={parent}", f"--documents={documents}", *wide, *fabric]),
        "distill_blocks": ("distill_blocks", [*blocks, *devices, *packed, *short]),
        "distill": ("distill", [*child, *short]),
        "distill_checkpointed": ("distill", [*child, *short, *checkpointed]),
        "rl_recover": ("rl_recover", [*whole, *rollouts, *prompts, *devices, *short, "--trainer.max_steps=1"]),
        "generate": ("generate", [f"--parent={parent}", f"--prompts.num_prompts={2 * rows}", *drawn]),
        "evaluate": ("evaluate", [f"--checkpoint={parent}", f"--held_out.prompts_per_effort={2 * rows}", *drawn]),
    }


MODULES = (
    *("peft", "matplotlib.pyplot", "pyarrow.parquet", "lit_puzzle.training.lightning"),
    *("lit_puzzle.rl.module", "lit_puzzle.rl.trl_engine", "lit_puzzle.data.rl_prompts", "lit_puzzle.data.documents"),
    *("lit_puzzle.distill.global_kd", "lit_puzzle.distill.blocks", "lit_puzzle.distill.top_logits"),
    *("lit_puzzle.importance.importance", "lit_puzzle.data.calibration", "lit_puzzle.kv_cache.calibrate"),
    *("lit_puzzle.scoring.scoring", "lit_puzzle.data.generate", "lit_puzzle.evaluate.accuracy"),
)


def make_models(folder: Path, size: int) -> None:
    """Write a random parent, sequences, documents and a library."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from lit_puzzle.data.document_files import Document, write_documents
    from lit_puzzle.importance.importance_file import Importance
    from lit_puzzle.library.candidates import library
    from lit_puzzle.model.checkpoint import fingerprint
    from lit_puzzle.tiny.tokenizer import build_tokenizer

    models, layers, tokens = folder / f"{LAYERS[size]}_layers", LAYERS[size], 1024 * 2**size
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


def import_all() -> None:
    """Import what the stages import, once: every run is a fork of this process."""
    allocator = ctypes.CDLL(None)
    allocator.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    allocator.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    allocator.malloc_trim(0)


def anonymous(pid: int) -> int:
    """Anonymous bytes of a process, or 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(status.split("RssAnon:")[1].split()[0]) if "RssAnon:" in status else 0


def start(words: list[str], out: Path, rank: int, processes: int, port: int) -> int:
    """Fork a process that runs a recipe; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(out / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from lit_puzzle.cli import main as run

    code = 1
    try:
        run(["run", *words])
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()  # the process ends below, before Python would print it
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)


def measured(folder: Path, stage: str, size: int, processes: int) -> tuple[float, str]:
    """Largest peak of the processes of one run, in bytes, and the end of what it printed where it failed."""
    recipe, words = stages(folder, size, processes)[stage]
    out = Path(tempfile.mkdtemp(dir=folder))
    run = [f"recipes/{recipe}.yaml", f"--run_dir={out / 'run'}", "--force", *words]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = anonymous(os.getpid())
    running = {start(run, out, rank, processes, port): rank for rank in range(processes)}
    peaks, failed = dict.fromkeys(running, 0), ""
    while running:
        for pid in list(running):
            peaks[pid] = max(peaks[pid], anonymous(pid))
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                rank = running.pop(pid)
                failed = failed or ("" if code == 0 else (out / f"log{rank}").read_text()[-1500:])
        time.sleep(0.002)
    return float(max(peaks.values()) - base), failed


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
    print(
        "| stage | processes | layers | predicted MiB | measured MiB | error | fullest |\n|---|---|---|---|---|---|---|"
    )
    for size in chosen.sizes:
        if not (folder / f"{LAYERS[size]}_layers" / "library" / "library.json").is_file():
            make = [sys.executable, str(HERE), "--make", str(size), "--out", str(folder)]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    import_all()
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
    parser.add_argument("--make", type=int, help="models of a size (used by this script)")
    parser.add_argument("--out", type=Path, help="where that writes")
    given = parser.parse_args()
    if given.make is not None:
        make_models(given.out, given.make)
    else:
        main(given)
