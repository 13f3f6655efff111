"""Small recovery runs for tests: a random child on disk, and a whole `Trainer.fit` in a forked process, killed or not.

Forked, because a run opens a process group (which must not leak into other tests) and may end by SIGKILL, and because
importing everything again would take longer than the run.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_puzzle.data.rl_prompts import PromptData
from lit_puzzle.environments.environment import EFFORTS, Environment
from lit_puzzle.evaluate.before_after import EvaluationSettings
from lit_puzzle.generation.lengths import LengthStatistics, write_lengths
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.rl.module import RLRecovery
from lit_puzzle.rl.settings import ExtraReward, GRPOLossSettings, GRPOSettings, RolloutSampling
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains, Counting
from lit_puzzle.training.checkpoints import BestCheckpoint, UpdateCheckpoint
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.sharding import Sharded, full

GRPO = GRPOSettings(
    num_generations=4,
    completions_per_device=4,
    steps_per_generation=4,
    num_iterations=2,
    sampling=RolloutSampling(max_new_tokens=6),
    loss=GRPOLossSettings(loss_type="grpo"),
)


def make_child(folder: Path, config: Any, experts: tuple[int, int] = (4, 3)) -> Path:
    """A random heterogeneous child in bf16 with the tiny world's tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    blocks: list[dict[str, int | None]] = [
        {"num_local_experts": experts[0], "sliding_window": 8},
        {"num_local_experts": experts[1], "sliding_window": None},
    ]
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(config, blocks)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_lengths(folder, {effort: LengthStatistics(6.0, 6.0, 6.0) for effort in EFFORTS})
    return folder


class Fingerprint(Chains):
    """Grades a completion by a number between 0 and 1 that any other text would change."""

    def verify(self, final: str, problem_answer: str) -> float:
        return zlib.crc32(final.encode()) % 1000 / 1000


def many_even_tokens(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that a random policy can raise."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) - 0.01 * len(ids) for ids in completion_ids]


class Recorder(Callback):
    """Appends every loss, exactly, to `losses.jsonl`, then calls `on_step`; validations to `validated.jsonl`."""

    def __init__(self, folder: Path, on_step: Callable[[int], None] | None = None, rank: int = 0) -> None:
        self.file, self.on_step = folder / f"losses{rank}.jsonl", on_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps([trainer.fit_loop.total_batch_idx, float(outputs["loss"]).hex()]) + "\n")
        if self.on_step is not None:
            self.on_step(trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank > 0:
            return
        with (self.file.parent / "validated.jsonl").open("a") as stream:
            stream.write(
                json.dumps([trainer.global_step, float(trainer.callback_metrics["val/accuracy"]).hex()]) + "\n"
            )


def losses(folder: Path, rank: int = 0) -> dict[int, str]:
    """Batch -> loss as hexadecimal text; a batch that was run again must have given the same."""
    return _history(folder / f"losses{rank}.jsonl")


def validations(folder: Path) -> list[tuple[int, str]]:
    """Step and metric of every validation in order; one that was run again must have given the same."""
    return list(_history(folder / "validated.jsonl").items())


def _history(file: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for line in file.read_text().splitlines():
        index, value = json.loads(line)
        assert found.setdefault(index, value) == value, f"{index} gave another value when it was run again"
    return found


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(folder: Path, devices: int, steps: int, callbacks: list[Callback], **overrides: Any) -> Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "strategy": Sharded(),
        "accelerator": "cpu",
        "devices": devices,
        "max_steps": steps,
        "max_epochs": -1,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "val_check_interval": 8,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": callbacks,
    }
    return Trainer(**(settings | overrides))


def checkpoints() -> tuple[UpdateCheckpoint, BestCheckpoint]:
    return UpdateCheckpoint(every_n_updates=4), BestCheckpoint()


def make_module(child: Path, **overrides: Any) -> RLRecovery:
    settings: dict[str, Any] = {
        "grpo": GRPO,
        "extra_rewards": [ExtraReward(many_even_tokens)],
        "evaluation": EvaluationSettings(prompts_per_effort=4, batch_size=8),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 20),
    }
    return RLRecovery(child, **(settings | overrides))


def make_data(prompts: int = 8, environments: Sequence[Environment] = (Chains(), Counting())) -> PromptData:
    return PromptData(list(environments), {"low": 1.0, "high": 1.0}, prompts, held_out_per_effort=4)


def save_weights(module: RLRecovery, folder: Path) -> None:
    """The trained parameters as they are at the end of training, whole."""
    weights = {name: full(p).detach().clone() for name, p in module.model.named_parameters() if p.requires_grad}
    torch.save(weights, folder / "weights.pt")


def script_validation(module: RLRecovery, scores: dict[int, float]) -> None:
    """Validates by a table of scores per step."""
    script = lambda: module.log("val/accuracy", scores[module.trainer.global_step])  # noqa: E731
    module.on_validation_epoch_end = script  # type: ignore[method-assign]


def fit(
    folder: Path,
    child: Path,
    steps: int,
    on_step: Callable[[int], None] | None = None,
    scores: dict[int, float] | None = None,
    callbacks: Sequence[Callback] = (),
    **trainer_settings: Any,
) -> RLRecovery:
    """One run of one process, resuming from what is in the folder; `scores` take the place of validation."""
    folder.mkdir(exist_ok=True)
    saved = checkpoints()
    trainer = make_trainer(folder, 1, steps, [Recorder(folder, on_step), *callbacks, *saved], **trainer_settings)
    module = make_module(child)
    if scores is not None:
        script_validation(module, scores)
    module.on_train_end = lambda: save_weights(module, folder)  # type: ignore[method-assign]  # before the best come back
    trainer.fit(module, datamodule=make_data(), ckpt_path=sound_checkpoint(folder))
    (folder / "results.json").write_text(json.dumps(module.results))
    (folder / "best.txt").write_text(Path(saved[1].best_model_path).name)
    return module


SLOW_SECONDS, LONGEST_SECONDS = 240, 900  # of a forked run; a disk that writes other tests' gigabytes can hold it up
TOLD_LINES = 40  # the last ones of what a process wrote that failed


def forked(processes: int, work: Callable[[int], object]) -> list[int | None]:
    """Runs `work(rank)` in forked processes that find each other as Lightning's do; their exit codes.

    What they write to stderr comes when all have ended: of one that failed its last lines, which say why.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> None:
        # The first call of torch after a fork makes a new thread pool for the lost one, which is not safe in several
        # threads at once (those that load weights, say): here there is only one.
        torch.set_num_threads(1)
        faulthandler.dump_traceback_later(SLOW_SECONDS, file=2)  # says where each thread is
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.dup2(written[rank].fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # pytest's writes past it
        work(rank)

    written = [tempfile.TemporaryFile() for _ in range(processes)]  # noqa: SIM115  (closed below)
    running = [get_context("fork").Process(target=child, args=(rank,)) for rank in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join(LONGEST_SECONDS)
        if process.is_alive():  # what it has open would keep others waiting
            process.kill()
    for rank, (process, file) in enumerate(zip(running, written, strict=True)):
        with file:
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
        failed = process.exitcode not in (0, -signal.SIGKILL)
        told = [f"rank {rank} ended with {process.exitcode}:", *lines[-TOLD_LINES:]] if failed else lines
        os.write(2, "".join(f"{line}\n" for line in told).encode())
    return [process.exitcode for process in running]
