"""Small runs of blockwise distillation for tests: a library of a random parent, and a whole fit in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer

from helpers.distillation_runs import make_models, random_documents
from helpers.recovery_runs import Recorder, make_trainer
from helpers.streamed_runs import ENOUGH_GIB
from lit_puzzle.data.document_files import write_documents
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.distill.blocks import BlockwiseDistillation
from lit_puzzle.library.library import Candidate, Library, candidate_name, parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.loading import load_model
from lit_puzzle.spec import BlockSpec
from lit_puzzle.training.checkpoints import UpdateCheckpoint
from lit_puzzle.training.lightning import sound_checkpoint

KEPT = {4: (0, 2, 5, 7), 2: (3, 6)}


class Inputs(NamedTuple):
    """Folders: a stock parent of two layers (the first with a window of 8), its library, and documents."""

    parent: Path
    library: Path
    documents: Path


def make_inputs(folder: Path, tiny_config: Callable[..., Any]) -> Inputs:
    parent = make_models(folder, tiny_config).parent
    make_alike(parent)
    write_documents(folder / "many", random_documents(200), parent)
    make_library(folder / "library", parent)
    return Inputs(parent, folder / "library", folder / "many")


def make_alike(parent: Path) -> None:
    """Make experts 2 i and 2 i + 1 equal: where one of them is pruned, the router can learn to choose the other."""
    model = load_model(parent, "bfloat16")
    for layer in model.model.layers:
        for tensor in layer.mlp.experts.parameters():
            tensor.data[1::2] = tensor.data[::2]
    model.save_pretrained(parent)


def make_library(folder: Path, parent: Path) -> Library:
    """4 or 2 of 8 experts; where attention is full, a window of 4; and both."""
    checkpoint = Checkpoint(parent)
    layers = []
    for own in parent_blocks(checkpoint.config):
        windows = [own.window_tokens] if own.window_tokens else [None, 4]
        blocks = [BlockSpec(kept, window) for window in windows for kept in (own.experts, *KEPT.values())]
        layers.append(tuple(Candidate(candidate_name(own, block), block) for block in blocks))
    library = Library(checkpoint.fingerprint(), 8, checkpoint.config, tuple(layers))
    folder.mkdir(exist_ok=True)
    library.save(folder)
    return library


def make_module(inputs: Inputs, **overrides: Any) -> BlockwiseDistillation:
    settings: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=4e-3, eps=1e-3, weight_decay=0.0),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 40),
        "clip_norm": 0.05,
    }
    return BlockwiseDistillation(inputs.parent, inputs.library, **(settings | overrides))


def make_data(inputs: Inputs, **overrides: Any) -> PackedDocuments:
    settings: dict[str, Any] = {"sequence_tokens": 32, "batch_size": 2, "validation_one_in": 6}
    return PackedDocuments(inputs.documents, inputs.parent, **(settings | overrides))


def fit(
    folder: Path,
    inputs: Inputs,
    steps: int,
    processes: int = 1,
    rank: int = 0,
    on_step: Callable[[int], None] | None = None,
    callbacks: Sequence[Callback] = (),
    data: dict[str, Any] | None = None,
    precision: Any = "32-true",
    **module: Any,
) -> BlockwiseDistillation:
    """One run of one process, resuming from what is in the folder."""
    folder.mkdir(exist_ok=True)
    settings = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "val_check_interval": 3}
    settings["precision"] = precision
    watched = [_Recorder(folder, on_step, rank), *callbacks, UpdateCheckpoint(every_n_updates=2)]
    trainer = make_trainer(folder, processes, steps, watched, **settings)
    made = make_module(inputs, **module)
    trainer.fit(made, datamodule=make_data(inputs, **(data or {})), ckpt_path=sound_checkpoint(folder))
    if rank == 0:
        torch.save(made.results, folder / "results.pt")
    return made


def fit_streamed(
    folder: Path,
    inputs: Inputs,
    steps: int,
    gib: float = ENOUGH_GIB,
    on_step: Callable[[int], None] | None = None,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    devices: int = 1,
    callbacks: Sequence[Callback] = (),
    **module: Any,
) -> BlockwiseDistillation:
    """The same run of a parent that is read one layer at a time."""
    folder.mkdir(exist_ok=True)
    settings = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "val_check_interval": 3, **(trainer or {})}

    def new_trainer(root: Path) -> Trainer:
        watched = [_Recorder(folder, on_step, 0), *callbacks, UpdateCheckpoint(every_n_updates=2)]
        return make_trainer(root, devices, steps, watched, **settings)

    made = make_module(inputs, memory_gib=gib, **module)
    made.fit_layers(new_trainer(folder), make_data(inputs, **(data or {})), new_trainer)
    torch.save(made.results, folder / "results.pt")
    return made


class _Recorder(Recorder):
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Validations are in the results."""


def library_bytes(folder: Path) -> dict[str, bytes]:
    """The files of the library that a run wrote."""
    return {path.name: path.read_bytes() for path in (folder / "library").iterdir()}
