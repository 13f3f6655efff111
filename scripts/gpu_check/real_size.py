"""Recipes of gpt-oss-20b on this device, as they are packaged but with few tokens, on random weights of its shapes.

Makes a checkpoint in the shapes of gpt-oss-20b (24 layers of 32 experts in MXFP4; 13 GB) and documents of random
tokens, then runs stages of `recipes/gpt_oss_20b` on one card, each in a process of its own: importance of experts
twice, so that the seconds for 1,000 tokens are a slope without loading; top-k logits; distillation of the model from
them, two updates of sequences of 16,384 tokens; two updates of `rl_recover` with its rollouts. `peak_gib` is the most
that CUDA's allocator held, `plan_gib` what `--plan` says of the same command. Random weights show what it costs and
that it runs; accuracies mean nothing. It must be asked for: it takes minutes and 60 GB of disk.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from part import Options, Row, run

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from streaming import VOCABULARY, make_parent

from lit_puzzle.data.document_files import Document, write_documents
from lit_puzzle.run.folder import PACKAGE

ONE_GPU = "gpt_oss_20b/one_gpu"
TINY = "lit_puzzle.tiny.world"
SMALL_PROMPT = 16


def work(options: Options) -> Iterator[Row]:
    """Make the inputs, then run one stage after the other."""
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    layers, experts, length, few, many = (1, 4, 64, 128, 256) if options.small else (24, 32, 8192, 32768, 262144)
    start = time.monotonic()
    make_parent(folder / "parent", layers, experts)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(PACKAGE / "assets" / "tiny_parent" / file, folder / "parent" / file)
    draw = random.Random(0)
    rows = [[draw.randrange(1000, VOCABULARY - 2000) for _ in range(length)] for _ in range(many // length)]
    mask = [0] * SMALL_PROMPT + [1] * (length - SMALL_PROMPT)
    write_documents(folder / "documents", [Document(row, mask, "random", "high") for row in rows], folder / "parent")
    yield {"made": "parent and documents", "layers": layers, "seconds": round(time.monotonic() - start, 1)}
    seconds = {}
    for tokens in (few, many):
        row = measured(f"importance_{tokens}", "gpt_oss_20b/importance", importance(folder, tokens), options)
        seconds[tokens] = row["run_seconds"]
        yield {"stage": "importance", "tokens": tokens} | row
    slope = 1000 * (seconds[many] - seconds[few]) / (many - few)
    yield {"importance": "seconds for 1,000 tokens", "slope": round(slope, 4)}
    words = [f"--parent={folder}/parent", f"--documents={folder}/documents", f"--batch_tokens={few}"]
    row = measured("precompute_logits", f"{ONE_GPU}/precompute_logits", words, options)
    yield {"stage": "precompute_logits", "tokens": many} | row
    sequence = 4 * length if options.small else 16384
    words = distillation(folder, sequence) + ["--model.init_args.training.trainable=attention"] * options.small
    row = measured("distill", f"{ONE_GPU}/distill", words, options)
    yield {"stage": "distill", "tokens": 4 * sequence} | row
    prompts, generated = (2, 4) if options.small else (4, 128)
    row = measured("rl_recover", f"{ONE_GPU}/rl_recover", recovery(folder, prompts, generated), options)
    yield {"stage": "rl_recover", "tokens": generated} | row


def importance(folder: Path, tokens: int) -> list[str]:
    """Return the overrides of the recipe for so many tokens of the documents."""
    return [
        *(f"--model.init_args.parent={folder}/parent", f"--data.init_args.parent={folder}/parent"),
        *(f"--data.init_args.documents.folder={folder}/documents", f"--data.init_args.documents.tokens={tokens}"),
    ]


def distillation(folder: Path, sequence_tokens: int) -> list[str]:
    """Return the overrides for two updates of two sequences; the model is its own parent."""
    return [
        f"--model.init_args.child={folder}/parent",
        f"--model.init_args.parent={folder}/precompute_logits/top_logits",
        *(f"--data.init_args.documents={folder}/documents", f"--data.init_args.sequence_tokens={sequence_tokens}"),
        *("--data.init_args.validation_one_in=0", "--data.init_args.filter.efforts=null"),
        *("--trainer.max_steps=2", "--trainer.accumulate_grad_batches=2"),
    ]


def recovery(folder: Path, prompts: int, generated: int) -> list[str]:
    """Return the overrides for two updates on problems of the tiny world, whose tokenizer the parent has."""
    init = "--model.init_args"
    environments = [{"class_path": f"{TINY}.{name}"} for name in ("Chains", "Counting")]
    return [
        f"{init}.child={folder}/parent",
        *(f"{init}.grpo.num_generations=4", f"{init}.grpo.steps_per_generation=4"),
        f"{init}.grpo.sampling.max_new_tokens={generated}",
        *(f"{init}.evaluation.prompts_per_effort={prompts}", f"{init}.evaluation.max_new_tokens={generated}"),
        f"--data.init_args.environments={json.dumps(environments)}",
        *(f"--data.init_args.train_prompts={8 * prompts}", f"--data.init_args.held_out_per_effort={prompts}"),
        *("--trainer.max_steps=2", "--trainer.accumulate_grad_batches=4", "--trainer.limit_val_batches=0"),
    ]


def measured(name: str, recipe: str, words: list[str], options: Options) -> Row:
    """Run a recipe; return seconds of the process and of the run, and peak and plan in GiB."""
    run_dir, cuda = options.folder / name, options.device == "cuda"
    command = [sys.executable, "-m", "lit_puzzle", "run", f"recipes/{recipe}.yaml", f"--run_dir={run_dir}", *words]
    place = "fabric" if name == "precompute_logits" else "trainer"
    command += [f"--{place}.accelerator={'gpu' if cuda else 'cpu'}", f"--{place}.devices=1"]
    start = time.monotonic()
    subprocess.run(command, check=True)
    seconds = round(time.monotonic() - start, 1)
    record: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    planned = subprocess.run([*command, "--plan", "--json"], check=True, capture_output=True, text=True).stdout
    plan_gib = json.loads(planned)["peak_bytes"] / 2**30
    shutil.rmtree(run_dir / "child", ignore_errors=True)  # 42 GB
    peak_gib = record["peak_memory_gib"]["gpu0"] if cuda else None
    return {"seconds": seconds, "run_seconds": record["seconds"], "peak_gib": peak_gib} | {
        "plan_gib": round(plan_gib, 2),
        "ok": peak_gib is None or peak_gib < 1.1 * plan_gib,
    }


if __name__ == "__main__":
    run(work)
