"""Small distillation runs for tests: a random parent with a child of it, documents, and a whole fit in this process."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import GptOssForCausalLM

from helpers.recovery_runs import make_child, make_trainer
from lit_puzzle.data.document_files import Document, write_documents
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.distill.global_kd import GlobalDistillation
from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.training.checkpoints import BestCheckpoint, UpdateCheckpoint
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.sharding import full

SEQUENCE_TOKENS = 32


class Models(NamedTuple):
    """Folders: a stock parent of two layers, a child of four and two experts, and documents for them."""

    parent: Path
    child: Path
    documents: Path


def make_models(folder: Path, tiny_config: Callable[..., Any], **overrides: Any) -> Models:
    torch.manual_seed(1)
    tokenizer = build_tokenizer()
    config = tiny_config(num_hidden_layers=2, max_position_embeddings=64, **overrides)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    small = tiny_config(num_hidden_layers=2, max_position_embeddings=64, **overrides)
    child = make_child(folder / "child", small, experts=(4, 2))
    write_documents(folder / "documents", random_documents(), folder / "parent", shard_documents=16)
    return Models(folder / "parent", child, folder / "documents")


def random_documents(count: int = 96) -> list[Document]:
    rng = random.Random(0)
    lengths = [(rng.randrange(3, 9), rng.randrange(2, 12)) for _ in range(count)]
    draw = lambda tokens: [3 + rng.randrange(110) for _ in range(tokens)]  # noqa: E731
    return [
        Document(draw(prompt + answer), [0] * prompt + [1] * answer, "random", "high") for prompt, answer in lengths
    ]


def make_data(models: Models, **overrides: Any) -> PackedDocuments:
    settings: dict[str, Any] = {"sequence_tokens": SEQUENCE_TOKENS, "batch_size": 2, "validation_one_in": 6}
    return PackedDocuments(models.documents, models.parent, **(settings | overrides))


def make_module(models: Models, **overrides: Any) -> GlobalDistillation:
    settings: dict[str, Any] = {
        "parent": models.parent,
        "loss": LossSettings(hidden=0.3, lm=0.1, chunk_tokens=16),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, eps=1e-3),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 20),
    }
    return GlobalDistillation(models.child, **(settings | overrides))


class LossRecorder(Callback):
    """Appends each batch's loss to `losses<rank>.jsonl` and each validation's to `validated.jsonl`, exactly."""

    def __init__(self, folder: Path, on_step: Callable[[int], None] | None = None, rank: int = 0) -> None:
        self.folder, self.on_step, self.rank = folder, on_step, rank

    def _write(self, name: str, key: int, value: Any) -> None:
        with (self.folder / name).open("a") as stream:
            stream.write(json.dumps([key, float(value).hex()]) + "\n")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._write(f"losses{self.rank}.jsonl", trainer.fit_loop.total_batch_idx, outputs["loss"])
        if self.on_step is not None:
            self.on_step(trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rank == 0:
            self._write("validated.jsonl", trainer.global_step, trainer.callback_metrics["val/loss"])


def fit(
    folder: Path,
    models: Models,
    steps: int,
    processes: int = 1,
    rank: int = 0,
    on_step: Callable[[int], None] | None = None,
    callbacks: Sequence[Callback] = (),
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **module: Any,
) -> GlobalDistillation:
    """One run of one process, resuming from what is in the folder; leaves the trained weights in `weights<rank>.pt`."""
    folder.mkdir(exist_ok=True)
    saved = [UpdateCheckpoint(every_n_updates=2), BestCheckpoint("val/loss", "min")]
    settings = {"accumulate_grad_batches": 1, "val_check_interval": 3} | (trainer or {})
    runner = make_trainer(
        folder, processes, steps, [LossRecorder(folder, on_step, rank), *callbacks, *saved], **settings
    )
    made = make_module(models, **module)
    made.on_train_end = lambda: save_weights(made, folder / f"weights{rank}.pt")  # type: ignore[method-assign]
    runner.fit(made, datamodule=make_data(models, **(data or {})), ckpt_path=sound_checkpoint(folder))
    (folder / f"results{rank}.json").write_text(json.dumps(made.results))
    return made


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """What `save_weights` kept."""
    return torch.load(folder / f"weights{rank}.pt", weights_only=True)


def results(folder: Path) -> dict[str, float]:
    """Headline numbers of a run."""
    return json.loads((folder / "results0.json").read_text())


def save_weights(module: GlobalDistillation, file: Path) -> None:
    """Everything that trains, and averages, whole, as training left it."""
    state = {name: full(p).detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    torch.save(state | {name: full(b).clone() for name, b in module.named_buffers() if "average" in name}, file)
