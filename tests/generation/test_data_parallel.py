"""Several engines that share the prompts: the completions of one, in order, resumable; a dead one is one error line."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from helpers.vllm_environment import ROOT, needs_vllm, output_of, start_in_vllm
from pyarrow.parquet import read_table

from lit_puzzle.generation.data_parallel import DataParallelEngine, engines_of
from lit_puzzle.generation.load import load_engine
from lit_puzzle.generation.processes import PROCESS, visible_gpus
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine

PARENT = ROOT / "lit_puzzle" / "assets" / "tiny_parent"
PROMPTS = [[1, 8, 3, 13, 14 + n % 7, 20 + n % 5] for n in range(11)]
ROWS = [5 * n + 2 for n in range(11)]
SAMPLED = Sampling(12, seed=3, logprobs=True)
TWO = EngineSettings("transformers", data_parallel=2)
RECIPE = ROOT / "recipes" / "generate.yaml"
SMALL = ["--prompts.num_prompts=40", "--shard_size=8", "--sampling.max_new_tokens=24", "--engine.name=transformers"]


def engine_processes(above: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(above).children() if PROCESS in child.cmdline()]


def tokens_of(folder: Path) -> list[list[int]]:
    shards = sorted((folder / "documents").glob("*.parquet"))
    return [row for shard in shards for row in read_table(shard)["input_ids"].to_pylist()]


@pytest.mark.slow
def test_two_engines_give_the_completions_of_one_in_order():
    one, two = load_engine(EngineSettings("transformers"), PARENT), load_engine(TWO, PARENT)
    assert isinstance(one, TransformersEngine) and isinstance(two, DataParallelEngine)
    expected = one.generate(PROMPTS, SAMPLED, ROWS)
    assert two.generate(PROMPTS, Sampling(12, seed=3), ROWS) == [
        type(done)(done.token_ids, done.finish) for done in expected
    ]
    assert two.generate(PROMPTS[:1], SAMPLED, ROWS[:1])[0].token_ids == expected[0].token_ids  # one has nothing to do
    assert two.generate([], SAMPLED) == []
    processes = engine_processes(os.getpid())
    assert len(processes) == 2
    del two
    assert not any(process.is_running() for process in processes)


@pytest.mark.slow
def test_what_an_engine_refuses_is_one_error_and_ends_all(tmp_path):
    shutil.copytree(PARENT, tmp_path / "parent")
    (tmp_path / "parent" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"engine \d of 2: .*model\.safetensors"):
        load_engine(TWO, tmp_path / "parent")
    assert engine_processes(os.getpid()) == []


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_is_named_by_its_place():
    two = load_engine(TWO, PARENT)
    with pytest.raises(ValueError, match=r"Prompt 1 is empty"):
        two.generate([[5], []], Sampling(4))


@pytest.mark.slow
def test_a_killed_engine_is_one_line_and_the_same_command_goes_on(tmp_path):
    words = [sys.executable, "-m", "lit_puzzle", "run", str(RECIPE), f"--run_dir={tmp_path / 'run'}", *SMALL]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*words, "--engine.data_parallel=2"], env=variables, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "documents" / "shard-00001.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    engine_processes(process.pid)[1].kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "engine 1 of 2 was killed by SIGKILL" in line and "run the same command again" in line
    before = (tmp_path / "run" / "documents" / "shard-00000.parquet").stat().st_mtime_ns
    subprocess.run([*words, "--engine.data_parallel=2"], env=variables, check=True, capture_output=True)
    assert (tmp_path / "run" / "documents" / "shard-00000.parquet").stat().st_mtime_ns == before
    words[5] = f"--run_dir={tmp_path / 'one'}"
    subprocess.run(words, env=variables, check=True, capture_output=True)
    assert len(tokens_of(tmp_path / "run")) == 40 and tokens_of(tmp_path / "run") == tokens_of(tmp_path / "one")


@pytest.mark.slow
def test_engines_end_with_a_stage_that_is_killed(tmp_path):
    words = [sys.executable, "-m", "lit_puzzle", "run", str(RECIPE), f"--run_dir={tmp_path / 'run'}"]
    words += ["--engine.data_parallel=2", "--engine.name=transformers"]
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    while len(engines := engine_processes(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    psutil.wait_procs(engines, timeout=60)
    assert not any(engine.is_running() for engine in engines)


def test_how_many_engines(monkeypatch):
    assert visible_gpus() == [] and engines_of(EngineSettings(data_parallel="auto")) == 1 and engines_of(TWO) == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    assert visible_gpus() == ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
    assert engines_of(EngineSettings(data_parallel="auto", tensor_parallel=2)) == 2
    with pytest.raises(ValueError, match="data_parallel 3 x tensor_parallel 2 were given; 4 GPUs are visible"):
        engines_of(EngineSettings(data_parallel=3, tensor_parallel=2))
    with pytest.raises(ValueError, match="data_parallel 0 were given"):
        EngineSettings(data_parallel=0)


@needs_vllm
def test_two_vllm_engines_give_the_completions_of_one_and_a_dead_one_is_one_line(tmp_path):
    output_of(start_in_vllm(ROOT / "tests" / "helpers" / "vllm_engines.py", PARENT, tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["two"] == found["one"] and len(found["one"]) == 21 and len({len(row) for row in found["one"]}) > 1
    assert found["error"].startswith("engine 1 of 2 was killed by SIGKILL") and "\n" not in found["error"]
