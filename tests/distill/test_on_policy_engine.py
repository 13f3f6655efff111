"""On-policy distillation with an engine beside the child, which gets the trained weights.

Most tests have transformers' model as the engine, in this process; the last one is a real vLLM.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.local_engine import LocalEngine
from helpers.on_policy_runs import ROLLOUTS, Pair, fit, make_pair, results, weights
from helpers.recovery_runs import forked, losses, validations
from helpers.vllm_environment import PYTHON, ROOT, needs_vllm
from lightning.pytorch import Callback

import lit_puzzle.generation.rollout_engine as rollout_engine
from lit_puzzle.generation.engine import EngineFailedError
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.training.settings import LoraSettings, TrainingSettings

VLLM = replace(ROLLOUTS, rollouts=RolloutSettings("vllm", max_mismatch=1e-5))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Pair:
    return make_pair(tmp_path_factory.mktemp("on_policy"), tiny_config)


def run(folder: Path, pair: Pair, steps: int = 4, callbacks: Any = (), **module: Any) -> None:
    """A whole run in a forked process, where engines are `LocalEngine`."""

    def work(rank: int) -> None:
        rollout_engine.EngineProcess = LocalEngine  # type: ignore[assignment, misc]
        torch.manual_seed(0)  # of adapters
        fit(folder, pair, steps, callbacks=callbacks, **module)

    assert forked(1, work) == [0]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["weights", "adapters"])
@pytest.mark.slow
def test_an_engine_with_the_newest_weights_samples_what_the_child_samples(
    pair: Pair, tmp_path: Path, lora: LoraSettings | None
) -> None:
    class Logged(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            logged = trainer.callback_metrics
            assert logged["train/sampling/mismatch"] < 1e-5 and logged["train/sampling/sync_bytes"] > 0

    training = TrainingSettings(lora=lora)
    run(tmp_path / "vllm", pair, callbacks=[Logged()], on_policy=VLLM, training=training)
    run(tmp_path / "own", pair, training=training)
    found, expected = ({k: float.fromhex(v) for k, v in losses(tmp_path / name).items()} for name in ("vllm", "own"))
    assert found == pytest.approx(expected, rel=1e-4)
    assert validations(tmp_path / "vllm") == validations(tmp_path / "own")
    assert results(tmp_path / "vllm") == pytest.approx(results(tmp_path / "own"), rel=1e-4)


@pytest.mark.slow
def test_an_engine_with_old_weights_stops_the_run_which_resumes(pair: Pair, tmp_path: Path) -> None:
    """It generates with old weights; the same command ends with the weights of a run without the failure."""

    class Stale(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:  # whose weights the engine has from the validation
                pl_module.sampler.vllm.update = lambda tensors: 0

    def stopped(rank: int) -> None:
        rollout_engine.EngineProcess = LocalEngine  # type: ignore[assignment, misc]
        torch.manual_seed(0)
        with pytest.raises(EngineFailedError, match=r"disagree in the rollout of update 5.*max_mismatch allows 1e-05"):
            fit(tmp_path / "stale", pair, 5, callbacks=[Stale()], on_policy=VLLM)

    assert forked(1, stopped) == [0]
    assert (tmp_path / "stale" / "checkpoints" / "step=4.ckpt").exists()
    for name in ("stale", "whole"):
        run(tmp_path / name, pair, 5, on_policy=VLLM)
    assert losses(tmp_path / "stale") == losses(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "stale")[name], tensor), name


RECIPE = """
base: {recipe}
trainer:
  max_steps: 3
  limit_val_batches: 0
  callbacks:
    - class_path: lit_puzzle.training.checkpoints.UpdateCheckpoint
      init_args: {{every_n_updates: 1}}
model:
  class_path: lit_puzzle.distill.on_policy.OnPolicyDistillation
  init_args:
    evaluation: {{prompts_per_effort: 2}}
    on_policy:
      completions_per_device: 16
      sampling: {{max_new_tokens: 24}}
      rollouts: {{engine: {engine}, kv_cache_gib: 0.1, context_tokens: 160, max_mismatch: 0.0001}}
data:
  class_path: lit_puzzle.data.rl_prompts.PromptData
  init_args: {{train_prompts: 64, held_out_per_effort: 2}}
"""


@needs_vllm
def test_a_real_vllm_samples_what_transformers_samples(tmp_path: Path) -> None:
    found = {}
    for engine in ("vllm", "transformers"):
        recipe = tmp_path / f"{engine}.yaml"
        recipe.write_text(RECIPE.format(recipe=ROOT / "recipes" / "on_policy.yaml", engine=engine))
        words: list[str | Path] = [PYTHON, "-m", "lit_puzzle", "run", recipe, f"--run_dir={tmp_path / engine}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        found[engine] = json.loads((tmp_path / engine / "run.json").read_text())["results"]
    for key in ("loss/first", "loss/last"):
        assert found["vllm"][key] == pytest.approx(found["transformers"][key], rel=1e-3)
