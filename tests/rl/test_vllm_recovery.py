"""`recipes/rl_recover.yaml` with vLLM's rollouts: killed at an arbitrary moment, then resumed, it is the same run."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from helpers.vllm_environment import PYTHON, ROOT, needs_vllm
from safetensors.torch import load_file

from lit_puzzle.generation.processes import PROCESS

RECIPE = """
base: {recipe}
trainer:
  max_steps: 4
  limit_val_batches: 0
  callbacks:
    - class_path: lit_puzzle.training.checkpoints.UpdateCheckpoint
      init_args: {{every_n_updates: 1}}
    - class_path: lit_puzzle.training.checkpoints.BestCheckpoint
model:
  class_path: lit_puzzle.rl.module.RLRecovery
  init_args:
    evaluation: {{prompts_per_effort: 2}}
    grpo:
      completions_per_device: 16
      sampling: {{max_new_tokens: 24}}
      rollouts: {{engine: vllm, kv_cache_gib: 0.1, context_tokens: 160, max_mismatch: 0.0001}}
data:
  class_path: lit_puzzle.data.rl_prompts.PromptData
  init_args: {{train_prompts: 64, held_out_per_effort: 2}}
"""


def start(folder: Path, run: str) -> subprocess.Popen[bytes]:
    (folder / "recipe.yaml").write_text(RECIPE.format(recipe=ROOT / "recipes" / "rl_recover.yaml"))
    words: list[str | Path] = [PYTHON, "-m", "lit_puzzle", "run", folder / "recipe.yaml", f"--run_dir={folder / run}"]
    with (folder / f"{run}.log").open("ab") as log:
        return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)


@needs_vllm
def test_killed_and_resumed_it_is_the_same_run(tmp_path):
    assert start(tmp_path, "whole").wait(900) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    process = start(tmp_path, "killed")
    while not (tmp_path / "killed" / "checkpoints" / "step=2.ckpt").exists():
        assert process.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
        time.sleep(0.05)
    own = psutil.Process(process.pid).children()
    mine = [child for child in own if PROCESS in child.cmdline()]
    assert len(mine) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(mine, timeout=20)
    assert not alive, "an engine outlived its run"
    assert start(tmp_path, "killed").wait(900) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    ours, theirs = (load_file(tmp_path / run / "child" / "model.safetensors") for run in ("killed", "whole"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    before = load_file(ROOT / "lit_puzzle" / "assets" / "tiny_child" / "model.safetensors")
    assert any((before[name] != theirs[name]).any() for name in theirs)
