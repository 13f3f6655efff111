"""Reinforcement learning in bf16-mixed on this device: `recipes/rl_recover.yaml`, shortened, and its table.

The recipe measures the embedded child before and after on the same held-out prompts. Ten updates are too few to
recover it; what is checked is that it runs, that its numbers are finite, and that something trains.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator

from part import Options, Row, Skipped, run

NEEDS = ("lightning", "trl", "peft", "jsonargparse", "accelerate")


def work(options: Options) -> Iterator[Row]:
    """Run the recipe in a process of its own and yield the numbers of its record."""
    for name in NEEDS:
        if importlib.util.find_spec(name) is None:
            raise Skipped(f"{name} is not installed")
    folder = options.folder / "rl_recover"
    shutil.rmtree(folder, ignore_errors=True)
    steps, prompts = (1, 2) if options.small else (10, 32)
    init = "--model.init_args"
    command = [sys.executable, "-m", "lit_puzzle", "run", "recipes/rl_recover.yaml", f"--run_dir={folder}"]
    command += [
        "--trainer.precision=bf16-mixed",
        f"--trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}",
    ]
    command += [f"--trainer.max_steps={steps}", f"{init}.evaluation.prompts_per_effort={prompts}"]
    if options.small:
        command += [f"{init}.grpo.completions_per_device=8", f"{init}.grpo.sampling.max_new_tokens=8"]
        command += [f"{init}.evaluation.max_new_tokens=8", "--data.init_args.train_prompts=24"]
        command += ["--data.init_args.held_out_per_effort=2", "--trainer.limit_val_batches=0"]
    subprocess.run(command, check=True)
    record = json.loads((folder / "run.json").read_text())
    for name, value in record["results"].items():
        finite = not isinstance(value, float) or math.isfinite(value)
        yield {"result": name, "value": value, "ok": finite}
    yield {"trained child": str(folder / "child"), "seconds": record.get("seconds"), "ok": (folder / "child").is_dir()}


if __name__ == "__main__":
    run(work)
