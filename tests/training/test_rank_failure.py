"""Two gloo processes of a command: one fails in the middle of a collective, the other one ends, the command resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback
from torch import distributed

from lit_puzzle.importance.importance_file import Importance

ROOT = Path(__file__).parents[2]
PARENT = ROOT / "lit_puzzle" / "assets" / "tiny_parent"
A_MINUTE = 60.0


class FailsOnce(Callback):
    """Waits in a collective on one process while another one fails in it; does nothing once `marker` exists.

    Args:
        marker: is made before the failure.
        rank: the process that fails.
        how: `raise`, `kill`, or `hang`: an error in a process that then waits for ever, in its clean-up.
    """

    def __init__(self, marker: str, rank: int, how: str) -> None:
        self.marker, self.rank, self.how = Path(marker), rank, how

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.marker.exists():
            return
        distributed.barrier()
        if trainer.global_rank != self.rank:
            distributed.all_reduce(torch.zeros(1))  # waits for the one that fails
            return
        time.sleep(1)
        self.marker.touch()
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the graphics card is on fire")

    def on_exception(self, trainer, pl_module, exception):
        if self.how == "hang" and trainer.global_rank == self.rank:
            time.sleep(3600)


def recipe(folder: Path, rank: int, how: str) -> Path:
    sequences = folder / "sequences.jsonl"
    sequences.write_text("".join(json.dumps({"input_ids": [3 + n, 9, 4, 7]}) + "\n" for n in range(8)))
    fails = {"marker": str(folder / "failed"), "rank": rank, "how": how}
    content = {
        "base": str(ROOT / "recipes" / "importance.yaml"),
        "run_dir": str(folder / "run"),
        "trainer": {
            "devices": 2,
            "accelerator": "cpu",
            "callbacks": [{"class_path": "test_rank_failure.FailsOnce", "init_args": fails}],
        },
        "model": {"init_args": {"parent": str(PARENT)}},
        "data": {
            "init_args": {"parent": str(PARENT), "prompts": None, "sequences": str(sequences), "batch_size": 2},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def start(file: Path) -> subprocess.Popen[str]:
    variables = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    words = [sys.executable, "-m", "lit_puzzle", "run", str(file)]
    return subprocess.Popen(words, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def processes_of(file: Path) -> list[int]:
    """Return the processes that still run this recipe."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(file).encode() in words:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "message"),
    [
        (1, "raise", "process 1 of 2 failed: RuntimeError: the graphics card is on fire"),
        (0, "raise", "process 0 of 2 failed: RuntimeError: the graphics card is on fire"),
        (1, "hang", "process 1 of 2 failed: RuntimeError: the graphics card is on fire"),
        (1, "kill", "process 1 of 2 was killed by SIGKILL"),
        (0, "kill", "process 0 of 2 was killed"),
    ],
)
def test_the_others_end_within_a_minute_and_the_same_command_resumes(tmp_path, rank, how, message):
    file = recipe(tmp_path, rank, how)
    process = start(file)
    output, _ = process.communicate(timeout=300)
    failed = (tmp_path / "failed").stat().st_mtime
    while processes_of(file):
        assert time.time() - failed < A_MINUTE, output
        time.sleep(0.2)
    assert process.returncode != 0 and not (tmp_path / "run" / "run.json").exists()
    assert f"error: {message}. This process stops, too; the same command continues the run." in output
    again = start(file)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert Importance.load(tmp_path / "run").tokens == 32
