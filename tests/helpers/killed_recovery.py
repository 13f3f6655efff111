"""RL recovery that is killed at a moment of a rollout, a loss, a backward pass, an update or a file; then resumed.

A moment is the N-th of its kind in a process, evaluations included: a pass of the first layer without gradients
(`rollout`) or with them (`loss`), its gradient (`backward`), begin or end of an update, a change in the run folder.
One of the processes is killed; the others have to end by themselves. Then the same run is started again.
"""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import torch
from faults.file_changes import watch
from lightning.pytorch import Callback, Trainer

from helpers.recovery_runs import (
    Recorder,
    forked,
    losses,
    make_data,
    make_module,
    make_trainer,
    save_weights,
    validations,
)
from lit_puzzle.callbacks.generation_length import GenerationLength
from lit_puzzle.callbacks.rollout_samples import RolloutSamples
from lit_puzzle.rl.module import RLRecovery
from lit_puzzle.training.checkpoints import BestCheckpoint, UpdateCheckpoint
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.loggers import CSV
from lit_puzzle.training.settings import LoraSettings, TrainingSettings

STEPS = 6
KINDS = ("rollout", "loss", "backward", "update", "file")
Moment = tuple[int, str, int]  # process, kind, number from 1


class Moments(Callback):
    """Counts moments, and kills this process at one of them."""

    def __init__(self, folder: Path, kill: tuple[str, int] | None) -> None:
        kind, number = kill or ("", 0)
        self.kind, self.number = kind, number
        self.counts = dict.fromkeys(KINDS, 0)
        self.changes = watch(folder.resolve(), number if kind == "file" else None)

    def count(self, kind: str) -> None:
        self.counts[kind] += 1
        if (kind, self.counts[kind]) == (self.kind, self.number):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        def forward(layer: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.count("loss" if torch.is_grad_enabled() else "rollout")
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.count("backward"))

        pl_module.model.model.layers[0].register_forward_hook(forward)

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.count("update")

    def on_before_zero_grad(self, *_: Any) -> None:
        self.count("update")


def run(folder: Path, child: Path, lora: bool, processes: int, rank: int, kill: tuple[str, int] | None) -> None:
    """One attempt of one process; a whole one leaves the counts of its moments."""
    folder.mkdir(exist_ok=True)
    moments = Moments(folder, kill)
    watching = [Recorder(folder, rank=rank), GenerationLength(child, window=1, max_tokens=6), RolloutSamples(1, 2)]
    saving = [UpdateCheckpoint(every_n_updates=2), BestCheckpoint()]
    logging = {"logger": CSV(folder), "log_every_n_steps": 1}
    trainer = make_trainer(folder, processes, STEPS, [moments, *watching, *saving], **logging)
    module: RLRecovery = make_module(child, training=TrainingSettings(lora=LoraSettings(rank=4) if lora else None))
    module.on_train_end = lambda: save_weights(module, folder)  # type: ignore[method-assign]
    trainer.fit(module, datamodule=make_data(prompts=16), ckpt_path=sound_checkpoint(folder))
    (folder / f"results{rank}.json").write_text(json.dumps(module.results))
    counts = moments.counts | {"file": len(moments.changes)}
    (folder.parent / f"{folder.name}.moments{rank}.json").write_text(json.dumps(counts))


class Kills:
    """Killed runs of one kind, compared with a whole one.

    Args:
        folder: for the runs.
        child: folder of the child.
        lora: whether adapters train, or the weights.
        processes: of each run.
    """

    def __init__(self, folder: Path, child: Path, lora: bool, processes: int) -> None:
        self.folder, self.child, self.lora, self.processes = folder, child, lora, processes
        folder.mkdir(parents=True, exist_ok=True)
        assert self.start("whole", None) == [0] * processes
        files = [folder / f"whole.moments{rank}.json" for rank in range(processes)]
        self.counts: list[dict[str, int]] = [json.loads(file.read_text()) for file in files]

    def start(self, name: str, moment: Moment | None) -> list[int | None]:
        """Run an attempt; the exit code of each process."""

        def work(rank: int) -> None:
            kill = moment[1:] if moment is not None and moment[0] == rank else None
            run(self.folder / name, self.child, self.lora, self.processes, rank, kill)

        return forked(self.processes, work)

    def draw(self, random_numbers: random.Random, kind: str) -> Moment:
        """Return a random moment of a kind."""
        rank = random_numbers.randrange(self.processes) if kind != "file" else 0  # the first process writes
        return rank, kind, random_numbers.randrange(1, self.counts[rank][kind] + 1)

    def wrong(self, *moments: Moment) -> str:
        """Kill a run at each moment, one attempt after the other, then let it end; return what is wrong, or ""."""
        name = "_".join(f"{rank}{kind}{number}" for rank, kind, number in moments)
        for moment in moments:
            codes = self.start(name, moment)
            if codes[moment[0]] not in (-signal.SIGKILL, 0) or None in codes:
                return f"exit codes {codes} when process {moment[0]} was killed"
        if self.start(name, None) != [0] * self.processes:
            return "the resumed run failed"
        ours, theirs = (everything(self.folder / run, self.processes) for run in (name, "whole"))
        return ", ".join(key for key in theirs if ours.get(key) != theirs[key])


def everything(folder: Path, processes: int) -> dict[str, Any]:
    """Losses, validations, final weights, results, logged rows and samples of a run."""
    weights = torch.load(folder / "weights.pt", weights_only=True)
    texts = ["results0.json", "logs/metrics.csv", "rollouts/episodes.jsonl"]
    return (
        {f"losses of process {rank}": losses(folder, rank) for rank in range(processes)}
        | {"validations": validations(folder)}
        | {f"weights {name}": tensor.numpy().tobytes() for name, tensor in weights.items()}
        | {name: (folder / name).read_text() for name in texts}
        | {"child": (folder / "child" / "model.safetensors").read_bytes()}
    )
