"""The batches of a run of blockwise distillation before it trains: how many updates, and each different batch once.

Reads the data module of the run; writes nothing. A batch that several epochs repeat has the same states of the parent.
Memory: 16 bytes for each token of different batches.
"""

from collections.abc import Iterator

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.model.state_files import hash_of

INPUTS = ("input_ids", "position_ids")  # of a batch, on which the parent's states depend


def check_one_process(trainer: Trainer, memory_gib: float) -> None:
    """Check that a run has one process.

    Raises:
        ValueError: it has several.
    """
    processes = trainer.num_devices * trainer.num_nodes
    if processes > 1:
        raise ValueError(
            f"memory_gib={memory_gib:g} reads the parent layer by layer in one process; the trainer has {processes}. "
            "Set trainer.devices: 1, or memory_gib: null to shard the parent over them."
        )


def updates_of(trainer: Trainer, batches_per_epoch: int) -> int:
    """Return the number of updates of a fit.

    Raises:
        ValueError: neither `max_steps` nor `max_epochs` bounds it.
    """
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    bounds = [trainer.max_steps] if trainer.max_steps >= 0 else []
    bounds += [epochs * batches_per_epoch] if epochs >= 0 else []
    if not bounds:
        raise ValueError("memory_gib: every layer trains for trainer.max_steps updates, which is not set. Set it.")
    return min(bounds)


def all_batches(data: LightningDataModule, updates: int) -> Iterator[PackedBatch]:
    """Yield the batches of all updates in their order, then those of validation."""
    loader, done = data.train_dataloader(), 0
    while done < updates:
        for batch in loader:
            yield batch
            done += 1
            if done == updates:
                break
    yield from data.val_dataloader()


def each_once(batches: Iterator[PackedBatch]) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
    """Return different batches, as far as the parent's states depend on them, and the index of each by its key."""
    different: list[dict[str, Tensor]] = []
    index_of: dict[str, int] = {}
    for batch in batches:
        if (key := key_of(batch)) not in index_of:
            index_of[key] = len(different)
            different.append({name: batch[name].cpu() for name in INPUTS})
    return different, index_of


def key_of(batch: PackedBatch) -> str:
    """Return what tells batches apart whose states of the parent differ."""
    return hash_of([{name: batch[name] for name in INPUTS}])
