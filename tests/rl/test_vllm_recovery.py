"""`recipes/rl_recover.yaml` with vLLM's rollouts; a process or an engine is killed: resumed, it is the same run.

Killed at an arbitrary moment, while weights are written for the engine, while they are read by it, while it generates.
By a rollout server it is the same run, too.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from helpers.vllm_environment import PYTHON, ROOT, needs_vllm, start_in_vllm
from safetensors.torch import load_file

from lit_puzzle.generation.processes import PROCESS
from lit_puzzle.generation.wire import KEY, SERVERS

RECIPE = """
base: {recipe}
trainer:
  max_steps: 3
  devices: {devices}
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
      completions_per_device: {completions}
      sampling: {{max_new_tokens: 24}}
      rollouts: {{engine: {engine}, kv_cache_gib: 0.1, context_tokens: 160, max_mismatch: 0.0001}}
data:
  class_path: lit_puzzle.data.rl_prompts.PromptData
  init_args: {{train_prompts: 64, held_out_per_effort: 2}}
"""
KILLER = ROOT / "tests" / "helpers" / "vllm_killed_run.py"


def start(
    folder: Path, run: str, devices: int = 1, kill: tuple[str, int, int] | None = None, engine: str = "vllm"
) -> subprocess.Popen[bytes]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            recipe=ROOT / "recipes" / "rl_recover.yaml",
            devices=devices,
            completions=16 // devices,
            engine=engine,
        )
    )
    program = ["-m", "lit_puzzle"] if kill is None else [KILLER, *map(str, kill)]
    words: list[str | Path] = [PYTHON, *program, "run", recipe, f"--run_dir={folder / run}"]
    with (folder / f"{run}.log").open("ab") as log:
        return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)


def said(folder: Path, run: str) -> str:
    return (folder / f"{run}.log").read_text()[-4000:]


def engines() -> set[int]:
    """Processes of engines on this machine."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if PROCESS in (process.info["cmdline"] or []):
            found.add(process.pid)
    return found


def check_no_orphans(before: set[int]) -> None:
    """Engines that a test started end with it; those of other tests may come and go."""
    own = [pid for pid in engines() - before if is_of_this_test(pid)]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in own if psutil.pid_exists(pid)], timeout=30)
    assert not alive, "an engine outlived its run"


def is_of_this_test(pid: int) -> bool:
    try:
        return psutil.Process(pid).environ().get("PYTEST_CURRENT_TEST") == os.environ["PYTEST_CURRENT_TEST"]
    except psutil.Error:
        return False


def child(folder: Path, run: str) -> bytes:
    return (folder / run / "child" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm_recovery")


def whole(folder: Path, devices: int) -> str:
    """An uninterrupted run, made once."""
    name = f"whole{devices}"
    if not (folder / name / "run.json").exists():
        assert start(folder, name, devices).wait(900) == 0, said(folder, name)
        before = load_file(ROOT / "lit_puzzle" / "assets" / "tiny_child" / "model.safetensors")
        after = load_file(folder / name / "child" / "model.safetensors")
        assert any((before[key] != after[key]).any() for key in after)
    return name


def kill_in_the_third_update(folder: Path, run: str, process: subprocess.Popen[bytes]) -> None:
    while not (folder / run / "checkpoints" / "step=2.ckpt").exists():
        assert process.poll() is None, said(folder, run)
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


@needs_vllm
def test_killed_and_resumed_it_is_the_same_run(folder: Path) -> None:
    expected, before = whole(folder, 1), engines()
    kill_in_the_third_update(folder, "killed", start(folder, "killed"))
    check_no_orphans(before)
    assert start(folder, "killed").wait(900) == 0, said(folder, "killed")
    assert child(folder, "killed") == child(folder, expected)


@pytest.mark.parametrize("devices", [1, 2])
@needs_vllm
def test_by_a_server_killed_and_resumed_it_is_the_same_run(
    folder: Path, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server answers both processes, outlives a run that is killed, and has no engine left of it."""
    expected, before, run = whole(folder, devices), engines(), f"served{devices}"
    monkeypatch.setenv(KEY, "a key for the tests of servers")
    server = start_in_vllm("-m", "lit_puzzle.generation.rollout_server", "--address=127.0.0.1:0")
    try:
        assert server.stdout is not None
        monkeypatch.setenv(SERVERS, server.stdout.readline().split()[2])
        kill_in_the_third_update(folder, run, start(folder, run, devices, engine="server"))
        check_no_orphans(before)
        assert start(folder, run, devices, engine="server").wait(900) == 0, said(folder, run)
        check_no_orphans(before)
    finally:
        server.kill()
        server.communicate()
    assert child(folder, run) == child(folder, expected)


KILLS = [
    *[("sync", 40, 0, 1), ("engine_reads", 2, 0, 1), ("engine_generates", 3, 0, 1)],
    *[("sync", 70, 0, 2), ("asks", 3, 1, 2)],
]


@pytest.mark.parametrize(("what", "number", "rank", "devices"), KILLS)
@needs_vllm
def test_killed_around_the_engine_it_resumes(folder: Path, what: str, number: int, rank: int, devices: int) -> None:
    """A run whose engine died ends by itself, with one line and exit code 2."""
    expected, before, run = whole(folder, devices), engines(), f"{what}{devices}"
    code = start(folder, run, devices, (what, number, rank)).wait(900)
    assert not (folder / run / "run.json").exists()
    if what.startswith("engine"):
        assert code == 2 and "was killed by SIGKILL" in said(folder, run), said(folder, run)
        assert "Traceback" not in said(folder, run)
    else:
        assert code != 0, said(folder, run)
    check_no_orphans(before)
    assert start(folder, run, devices).wait(900) == 0, said(folder, run)
    assert child(folder, run) == child(folder, expected)
