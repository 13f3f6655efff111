"""Evaluations of a parent with one block replaced: any task that says how right each item was.

The ordinary scores look at each next token and so have a locality bias: most tokens need nothing from far away. A
window is therefore scored by the accuracy it costs on tasks that do need it, and such a task is an `Evaluation`: given
by `class_path`: `lit_puzzle.evaluate.long_context.LongContextAccuracy`, or a long-context benchmark of yours.

damage = mean over items of (parent's score - candidate's score), standard error of that paired difference.

Reads and writes nothing. Source: arXiv 2602.11937 section 4 (AA-LCR accuracy with one layer replaced). Memory: the
    model (whole on each process while it answers, see `lit_puzzle.training.sharding.unsharded`) + the KV cache of a
    batch. Traffic: one gather of the weights per candidate, 8 bytes an item.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.training.fabric import sum_over_processes
from lit_puzzle.training.sharding import unsharded


class Evaluation(Protocol):
    """What scoring asks of an evaluation. Both methods must be deterministic.

    `Any` below lets an implementation annotate its own types: recipes compare annotations to the letter.

    Attributes:
        name: The metric's name in the scores.
    """

    name: str

    def items(self, tokenizer: Any) -> Any:
        """All items, a sequence, the same on every process, given the parent's tokenizer."""
        ...

    def scores(self, policy: Any, tokenizer: Any, items: Any) -> Any:
        """How right the model's answer to each of a sequence of items is: a list of numbers from 0 to 1."""
        ...


def task_items(task: Evaluation, tokenizer: PreTrainedTokenizerBase) -> Sequence[Any]:
    """All items of a task.

    Raises:
        ValueError: Fewer than two, or what the task itself refuses.
    """
    items: Sequence[Any] = task.items(tokenizer)
    if len(items) < 2:
        raise ValueError(f"evaluation {task.name!r} has {len(items)} items; a standard error needs two")
    return items


def answer_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Evaluation,
    items: Sequence[Any],
    processes: Fabric,
    unshard: bool,
) -> list[float]:
    """The scores of all items, which the processes share out among themselves; every process gets them all.

    Each answers as many items (a process that has one less repeats the last), so that it may call the model as often.

    Raises:
        ValueError: Not one score per item, or one outside 0..1.
    """
    rank, world_size = processes.global_rank, processes.world_size
    turns = range(rank, -(-len(items) // world_size) * world_size, world_size)
    with _ready_to_generate(model, unshard):
        mine = task.scores(model, tokenizer, [items[min(turn, len(items) - 1)] for turn in turns])
    if len(mine) != len(turns) or not all(0 <= score <= 1 for score in mine):
        raise ValueError(
            f"evaluation {task.name!r} gave {len(mine)} scores for {len(turns)} items, from {min(mine, default=None)} "
            f"to {max(mine, default=None)}; it must give one in 0..1 for each"
        )
    scores = torch.zeros(len(items), dtype=torch.float64)
    for turn, value in zip(turns, mine, strict=True):
        if turn < len(items):
            scores[turn] = value
    return sum_over_processes(processes, scores).tolist()


@contextmanager
def _ready_to_generate(model: PreTrainedModel, unshard: bool) -> Iterator[None]:
    """Weights gathered, or else every process kept in step: transformers then decodes until the last one has ended."""
    if unshard or not any(isinstance(module, FSDPModule) for module in model.modules()):
        with unsharded(model):
            yield
        return
    model._is_fsdp_managed_module = True
    try:
        yield
    finally:
        del model._is_fsdp_managed_module
