"""vLLM beside the policy on this device: `recipes/rl_recover.yaml` with `rollouts.engine: vllm`, shortened.

On a GPU twice in bf16-mixed, without and with router replay: how far the log-probabilities of engine and policy are
apart, the share of tokens whose routes were replayed, and what an update takes with the engine asleep while training.
The interpreter is VLLM_PYTHON, that of .venv-vllm, or this one; it must have this project installed (for its plugin).
"""

import csv
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fp8_kv import interpreter
from part import Options, Row, Skipped, run

PROBE = """
from importlib.metadata import entry_points
import jsonargparse, lightning, peft, trl
assert entry_points(group="vllm.general_plugins", name="lit_puzzle")
"""
INIT = "--model.init_args"


def work(options: Options) -> Iterator[Row]:
    """Run the recipe for each kind of rollouts and yield what it logged."""
    python = interpreter()
    if subprocess.run([python, "-c", PROBE], capture_output=True, check=False).returncode:
        raise Skipped(f"{python} lacks this project or its dependencies (bash scripts/vllm_env.sh)")
    for replay in (False, True) if options.device == "cuda" else (False,):
        folder = options.folder / f"replay_{replay}".lower()
        shutil.rmtree(folder, ignore_errors=True)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})
        subprocess.run([str(python), *words(options, folder, replay)], check=True, env=environment)
        yield {"replay": replay} | measured(folder, replay)


def words(options: Options, folder: Path, replay: bool) -> list[str]:
    """Return the words of the command after the interpreter."""
    steps, prompts, completions, tokens = (2, 2, 8, 16) if options.small else (8, 16, 64, 96)
    rollouts = f"{INIT}.grpo.rollouts"
    return [
        *("-m", "lit_puzzle", "run", "recipes/rl_recover.yaml", f"--run_dir={folder}"),
        f"--trainer.precision={'bf16-mixed' if options.device == 'cuda' else '32-true'}",
        *(f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"),
        f"--data.init_args.train_prompts={8 * steps}",
        *("--data.init_args.held_out_per_effort=2", f"{INIT}.evaluation.prompts_per_effort={prompts}"),
        *(f"{INIT}.grpo.completions_per_device={completions}", f"{INIT}.grpo.sampling.max_new_tokens={tokens}"),
        *(f"{rollouts}.engine=vllm", f"{rollouts}.context_tokens=512", f"{rollouts}.kv_cache_gib=0.25"),
        f"{rollouts}.replay_routes={replay}".lower(),
    ]


def measured(folder: Path, replay: bool) -> Row:
    """Return the numbers of a run: medians over its updates, and the largest mean difference."""
    with (folder / "logs" / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("train/sampling/kl")]
    mean = [float(row["train/sampling/sampling_logp_difference/mean"]) for row in rows]
    kl = [float(row["train/sampling/kl"]) for row in rows]
    share = min(float(row["train/sampling/replayed"]) for row in rows) if replay else None
    record = json.loads((folder / "run.json").read_text())
    return {
        "updates": len(rows),
        "mean |gap of log-probability|": float(f"{statistics.median(mean):.3g}"),
        "largest mean": float(f"{max(mean):.3g}"),
        "KL": float(f"{statistics.median(kl):.3g}"),
        "replayed": share,
        "bytes sent": int(float(rows[0]["train/sampling/sync_bytes"])),
        "seconds": record.get("seconds"),
        "ok": max(mean) < 0.1 and (share is None or share > 0.9),
    }


if __name__ == "__main__":
    run(work)
