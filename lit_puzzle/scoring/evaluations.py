"""Evaluations of a parent with one block replaced: any task that gives a score to each of its items.

The other metrics look at each next token and have a locality bias: most tokens need nothing from far away. A window is
therefore also scored by the accuracy that it costs on tasks that need distant tokens. Such a task is an `Evaluation`,
given by `class_path`: `lit_puzzle.evaluate.long_context.LongContextAccuracy`, or a long-context benchmark of yours.

quality loss = mean over items of (parent's score - candidate's score), with the standard error of that paired
difference. An evaluation that decodes answers (`Measuring`) also gives the change of their length and of their ends,
at each reasoning effort, without a further pass:

    tokens/<effort>     mean over the items of the effort of (candidate's - parent's) generated tokens of an answer
    cut/<effort>        the same of 1 where the answer was cut off at the cap, else 0
    looping/<effort>    the same of 1 where it ends in a loop, else 0

Reads and writes nothing. Source: arXiv 2602.11937 section 4 (AA-LCR accuracy with one layer replaced). Memory: the
model (whole on each process while it generates, see `lit_puzzle.training.sharding.unsharded`) and the KV cache of a
batch. Traffic: one gather of the weights per candidate, 8 bytes per item.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric import Fabric
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.run.identity import Identity, text_hash
from lit_puzzle.scoring.score_files import Values
from lit_puzzle.training.fabric import sum_over_processes
from lit_puzzle.training.sharding import unsharded

SCORE = "score"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object that has no text of its own


class Evaluation(Protocol):
    """Interface of an evaluation. Both methods must be deterministic.

    The annotations are `Any` so that an implementation may use types of its own: recipes are checked by comparing
    annotations literally.

    Attributes:
        name: name of the metric in the scores.
    """

    name: str

    def items(self, tokenizer: Any) -> Any:
        """Return all items, a sequence that is the same on every process.

        Args:
            tokenizer: the parent's tokenizer.
        """
        ...

    def scores(self, policy: Any, tokenizer: Any, items: Any) -> Any:
        """Return the model's score on each of a sequence of items, a list of numbers from 0 to 1.

        Args:
            policy: the model, with a candidate in place.
            tokenizer: the parent's tokenizer.
            items: some of what `items` returned.
        """
        ...


@runtime_checkable
class WithLengths(Protocol):
    """An `Evaluation` that knows how long its items are: those within a window cannot tell what the window costs."""

    def tokens(self, tokenizer: Any, items: Any) -> Any:
        """Return the most tokens that prompt and completion of each item have, a list of int.

        Args:
            tokenizer: the parent's tokenizer.
            items: what `items` returned.
        """
        ...


@runtime_checkable
class Measuring(Protocol):
    """An `Evaluation` that measures more of each item than its score, in the same pass."""

    def efforts(self, items: Any) -> Any:
        """Return the reasoning effort of each item, a list of str.

        Args:
            items: what `items` returned.
        """
        ...

    def values(self, policy: Any, tokenizer: Any, items: Any) -> Any:
        """Return name -> value of each item: `score` as `Evaluation.scores`, and what else is measured.

        Args:
            policy: the model, with a candidate in place.
            tokenizer: the parent's tokenizer.
            items: some of what `items` returned.
        """
        ...

    def values_by_engine(self, engine: Any, tokenizer: Any, items: Any) -> Any:
        """Return the same from an engine (`ByEngine`)."""
        ...


@runtime_checkable
class ByEngine(Protocol):
    """An `Evaluation` that can also be run by an engine, on a checkpoint folder.

    Attributes:
        engine: settings of the engine (`lit_puzzle.generation.sampling.EngineSettings`); None: the parent in memory.
    """

    engine: Any

    def scores_by_engine(self, engine: Any, tokenizer: Any, items: Any) -> Any:
        """Return the score on each item, as `Evaluation.scores` does.

        Args:
            engine: of the model, ready to generate (`lit_puzzle.generation.engine.Engine`).
            tokenizer: the parent's tokenizer.
            items: what `items` returned.
        """
        ...


def measuring(evaluation: Evaluation) -> Measuring | None:
    """Return an evaluation that is `Measuring`, None for any other.

    A subclass with its own way to score is another: what it inherits would measure as the class above it does.
    """
    kind, pairs = type(evaluation), (("values", "scores"), ("values_by_engine", "scores_by_engine"))
    if isinstance(evaluation, Measuring) and all(_defining(kind, of) <= _defining(kind, by) for of, by in pairs):
        return evaluation
    return None


def _defining(kind: type, method: str) -> int:
    """Return how many classes up a method is defined; beyond all of them if it is in none."""
    return next((up for up, above in enumerate(kind.__mro__) if method in vars(above)), len(kind.__mro__))


def item_tokens(
    evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase, items: Sequence[Any]
) -> Sequence[int] | None:
    """Return the length of every item; None where the evaluation does not know."""
    return list(evaluation.tokens(tokenizer, items)) if isinstance(evaluation, WithLengths) else None


def evaluation_items(evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> Sequence[Any]:
    """Return all items of an evaluation.

    Args:
        evaluation: the evaluation.
        tokenizer: the parent's.
        context_tokens: what the model reads at most.

    Raises:
        ValueError: there are fewer than two, one is longer than the context, or the evaluation itself refuses.
    """
    items: Sequence[Any] = evaluation.items(tokenizer)
    if len(items) < 2:
        raise ValueError(f"evaluation {evaluation.name!r} has {len(items)} items; a standard error needs two")
    longest = max(item_tokens(evaluation, tokenizer, items) or [0])
    if longest > context_tokens:
        raise ValueError(
            f"evaluation {evaluation.name!r}: a prompt with its completion has up to {longest} tokens; the model's "
            f"context holds {context_tokens} (max_position_embeddings). Ask for shorter prompts or completions."
        )
    return items


def items_identity(evaluation: Evaluation, items: Sequence[Any]) -> Identity:
    """Return the identity of the items of an evaluation: of their texts as Python shows them, without addresses."""
    texts = (ADDRESS.sub("", repr(item)) for item in items)
    return Identity(f"items of {evaluation.name}", {"items": text_hash(*texts)})


def check_values(evaluation: Evaluation, values: Values, count: int) -> None:
    """Check the scores of `count` items, and what else was measured of them.

    Raises:
        ValueError: there is not one for each, a score is outside 0..1, or another value is not finite.
    """
    scores = values[SCORE]
    if len(scores) != count or not all(0 <= score <= 1 for score in scores):
        raise ValueError(
            f"evaluation {evaluation.name!r} gave {len(scores)} scores for {count} items, from "
            f"{min(scores, default=None)} to {max(scores, default=None)}; it must give one in 0..1 for each"
        )
    for name, numbers in values.items():
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"evaluation {evaluation.name!r} gave {len(numbers)} values {name!r} for {count} items; it must give a "
                "finite one for each"
            )


def by_effort(evaluation: Evaluation, items: Sequence[Any], values: Values) -> Values:
    """Return the scores of all items, and what else was measured as `<name>/<effort>` of the items of each effort.

    An effort with one item is left out: its change would have no standard error.
    """
    found = {SCORE: values[SCORE]}
    measured = measuring(evaluation)
    if measured is not None:
        efforts = list(measured.efforts(items))
        for name in values.keys() - {SCORE}:
            for effort in dict.fromkeys(efforts):
                own = [value for value, other in zip(values[name], efforts, strict=True) if other == effort]
                found |= {f"{name}/{effort}": own} if len(own) > 1 else {}
    return dict(sorted(found.items()))


def score_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: Evaluation,
    items: Sequence[Any],
    processes: Fabric,
    unshard: bool,
) -> Values:
    """Score all items, divided among the processes; every process gets all values.

    Every process scores the same number of items (one that has fewer repeats the last), so that all of them call a
    sharded model equally often.

    Args:
        model: the model, with a candidate in place.
        tokenizer: the parent's tokenizer.
        evaluation: the evaluation.
        items: its items.
        processes: the processes.
        unshard: whether sharded weights are gathered once for all items.

    Returns:
        `score` of every item, and what else a `Measuring` evaluation has measured of it.

    Raises:
        ValueError: the evaluation does not give one score per item, or one outside 0..1.
    """
    rank, world_size = processes.global_rank, processes.world_size
    own = range(rank, -(-len(items) // world_size) * world_size, world_size)
    share = [items[min(index, len(items) - 1)] for index in own]
    with _ready_to_generate(model, unshard):
        measured = measuring(evaluation)
        if measured is None:
            values: Values = {SCORE: evaluation.scores(model, tokenizer, share)}
        else:
            values = measured.values(model, tokenizer, share)
    check_values(evaluation, values, len(own))
    table = torch.zeros(len(values), len(items), dtype=torch.float64)
    for row, numbers in zip(table, values.values(), strict=True):
        for index, value in zip(own, numbers, strict=True):
            if index < len(items):
                row[index] = value
    return dict(zip(values, sum_over_processes(processes, table).tolist(), strict=True))


@contextmanager
def _ready_to_generate(model: PreTrainedModel, unshard: bool) -> Iterator[None]:
    """Gather the weights, or else keep every process in step: transformers then decodes until the last has finished."""
    if unshard or not any(isinstance(module, FSDPModule) for module in model.modules()):
        with unsharded(model):
            yield
        return
    model._is_fsdp_managed_module = True
    try:
        yield
    finally:
        del model._is_fsdp_managed_module
