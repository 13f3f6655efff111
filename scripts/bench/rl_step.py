"""CPU seconds of an RL update driven by Lightning, as in recipes/rl_recover.yaml, against `GRPOTrainer.train()`.

Both sides train the same model on the same prompts with the same seed, so they sample the same completions and end in
the same weights; each run is a fresh forked process, the sides take turns, one thread. The first updates of a run are
not counted. Last line: one JSON object; ratio = ours / reference, the goal is at most 1.05.

    OMP_NUM_THREADS=1 python scripts/bench/rl_step.py [--runs 7] [--updates 8]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOTrainer

from lit_puzzle.data.rl_prompts import PromptData
from lit_puzzle.environments.answer_formats import answer_format
from lit_puzzle.environments.environment import Environment
from lit_puzzle.evaluate.before_after import EvaluationSettings
from lit_puzzle.model.modules import model_family
from lit_puzzle.rl.module import RLRecovery
from lit_puzzle.rl.rewards import Correctness
from lit_puzzle.rl.settings import GRPOSettings, RolloutSampling
from lit_puzzle.rl.trl_config import grpo_config
from lit_puzzle.tiny.world import Chains, Counting, Sorting
from lit_puzzle.training.sharding import Sharded
from lit_puzzle.training.trainable import freeze_parameters

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
MODEL = ASSETS / ("tiny_child" if (ASSETS / "tiny_child").is_dir() else "tiny_parent")
GRPO = GRPOSettings(num_generations=8, completions_per_device=64, sampling=RolloutSampling(max_new_tokens=96))
WARM_UP = 2
LEARNING_RATE = 5e-4


def prompts() -> PromptData:
    """Return the recipe's data."""
    environments: list[Environment] = [Chains(), Sorting(), Counting()]
    return PromptData(environments, {"low": 1.0, "medium": 1.0, "high": 1.0}, 256, held_out_per_effort=2)


class LightningClock(Callback):
    """CPU seconds from the end of the warm-up to the end of the last update."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Start and stop the clock."""
        if trainer.global_step == WARM_UP:
            self.began = time.process_time()
        self.ended = time.process_time()


class TrlClock(TrainerCallback):
    """The same for TRL's own loop."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start and stop the clock."""
        if state.global_step == WARM_UP:
            self.began = time.process_time()
        self.ended = time.process_time()


def ours(updates: int, folder: Path) -> float:
    """Seconds per update of `Trainer.fit`."""
    clock = LightningClock()
    trainer = Trainer(
        default_root_dir=folder,
        strategy=Sharded(),
        accelerator="cpu",
        devices=1,
        max_steps=WARM_UP + updates,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[clock],
    )
    module = RLRecovery(
        MODEL,
        grpo=GRPO,
        evaluation=EvaluationSettings(prompts_per_effort=2, max_new_tokens=2),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE),
    )
    trainer.fit(module, datamodule=prompts())
    return (clock.ended - clock.began) / updates


def reference(updates: int, folder: Path) -> float:
    """Seconds per update of `GRPOTrainer.train()`."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype="float32", attn_implementation="sink_attention", experts_implementation="grouped_mm"
    )
    freeze_parameters(policy, model_family(policy).layer.frozen)
    config = grpo_config(GRPO, 1, "32-true", torch.device("cpu"), folder, reward_weights=[1.0])
    config.max_steps, config.max_grad_norm = WARM_UP + updates, 1.0
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=LEARNING_RATE)
    clock, data = TrlClock(), prompts()
    GRPOTrainer(
        model=policy,
        reward_funcs=[Correctness(tuple(data.environments), tokenizer, answer_format(tokenizer))],
        args=config,
        train_dataset=data.train_prompts(tokenizer),
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        callbacks=[clock],
    ).train()
    return (clock.ended - clock.began) / updates


def in_a_fresh_process(side: Callable[[int, Path], float], updates: int) -> float:
    """Run one side where it sees neither the process group nor the random generators of another run."""

    def work(pipe: Connection) -> None:
        with tempfile.TemporaryDirectory() as folder:
            pipe.send(side(updates, Path(folder)))

    receiver, sender = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=work, args=(sender,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{side.__name__} failed with exit code {process.exitcode}")
    return float(receiver.recv())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--updates", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sides = {"ours": ours, "reference": reference}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(arguments.runs):
        for name in sorted(sides, reverse=run % 2 == 1):
            seconds[name].append(in_a_fresh_process(sides[name], arguments.updates))
            print(f"run {run + 1} {name}: {seconds[name][-1]:.3f} CPU seconds per update", flush=True)
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    ratio = round(medians["ours"] / medians["reference"], 4)
    unit = "CPU seconds per update"
    print(json.dumps({"name": "rl_step", **medians, "ratio": ratio, "unit": unit, "runs": arguments.runs}))


if __name__ == "__main__":
    main()
