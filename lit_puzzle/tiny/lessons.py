"""Lessons that teach the tiny world to a model from scratch: three phases, every batch a pure function of its step.

    retrieval    a table of 3 to 16 definitions, then the same definitions in other orders: predict each right-hand side
    practice     a table, then questions with their high-effort analyses as plain text: predict analyses
    supervised   conversations about one table at mixed efforts: predict the assistant's tokens

Before retrieval works nothing else can be learned, and it appears suddenly: short tables first, or it takes many times
longer. Problems that are held out are never shown.

Reads and writes nothing. Source: this project's own. Shapes: B sequences of a batch, T tokens.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from lit_puzzle.environments.environment import Problem, effort_weights, is_held_out, render_prompt
from lit_puzzle.tiny.world import TABLE_SIZE, Family, define, parse

IGNORED = -100
Sequences = list[tuple[list[int], list[int]]]  # (token ids, labels) each


@dataclass(frozen=True)
class Curriculum:
    """How many steps each phase takes and what a step holds.

    Attributes:
        retrieval_steps: steps of the first phase.
        practice_steps: steps of the second phase; all steps after it are supervised.
        first_entries: definitions in a table at the first step; it grows to all 16 over 90% of the first phase.
        sequences: sequences of a batch; families take turns.
        sequence_tokens: longest sequence of the second and third phase.
        efforts: weight of each effort in the third phase.
    """

    retrieval_steps: int = 110
    practice_steps: int = 60
    first_entries: int = 3
    sequences: int = 32
    sequence_tokens: int = 192
    efforts: Mapping[str, float] = field(default_factory=lambda: {"low": 1.0, "medium": 1.0, "high": 1.0})

    def __post_init__(self) -> None:
        """Checks the numbers."""
        effort_weights(self.efforts)
        if min(self.retrieval_steps, self.practice_steps) < 0 or self.sequences < 1 or self.sequence_tokens < 128:
            raise ValueError(f"{self}: steps must be >= 0, sequences >= 1, sequence_tokens >= 128.")
        if not 1 <= self.first_entries <= TABLE_SIZE:
            raise ValueError(f"first_entries {self.first_entries} must be between 1 and {TABLE_SIZE}.")

    def entries(self, step: int) -> int:
        """Definitions in a table at a step of the first phase."""
        grown = (TABLE_SIZE - self.first_entries + 1) * step / max(0.9 * self.retrieval_steps, 1.0)
        return min(TABLE_SIZE, self.first_entries + int(grown))


class Lessons(IterableDataset[dict[str, Tensor]]):
    """Batches of the curriculum from a step on: `input_ids` and `labels`, both BT.

    Args:
        curriculum: the phases.
        families: what is taught.
        tokenizer: the tiny world's.
        seed: a batch depends on it and on its step only, so a resumed run sees what an uninterrupted one would.
        first_step: the step to begin with.
        last_step: the step to end before.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        families: Sequence[Family],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        first_step: int,
        last_step: int,
    ) -> None:
        self.curriculum = curriculum
        self.families = families
        self.tokenizer = tokenizer
        self.seed = seed
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.batch(step) for step in self.steps)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of one step."""
        rng = random.Random(f"lessons {self.seed} {step}")
        plan = self.curriculum
        sequences: Sequences = []
        for index in range(plan.sequences):
            family = self.families[index % len(self.families)]
            if step < plan.retrieval_steps:
                sequences.append(retrieval(self.tokenizer, family, rng, plan.entries(step)))
            elif step < plan.retrieval_steps + plan.practice_steps:
                sequences.append(practice(self.tokenizer, family, rng, plan.sequence_tokens))
            else:
                sequences.append(supervised(self.tokenizer, family, rng, plan.sequence_tokens, plan.efforts))
        return collate(sequences, self.tokenizer)


def retrieval(
    tokenizer: PreTrainedTokenizerBase, family: Family, rng: random.Random, entries: int
) -> tuple[list[int], list[int]]:
    """A table and its definitions again, reordered; labels are what follows each ` q=` of the copies."""
    table, _, _ = parse(_problems(family, rng, 1)[0])
    letters = list(table)[:entries]
    copies = []
    for _ in range(max(1, TABLE_SIZE // entries)):
        copies += [define(table, letter) for letter in rng.sample(letters, entries)]
    shown = _ids(tokenizer, family.name + "".join(define(table, letter) for letter in letters))
    copied = [_ids(tokenizer, definition) for definition in copies]
    labels = [IGNORED] * len(shown) + [label for ids in copied for label in (IGNORED, *ids[1:])]
    return shown + [token for ids in copied for token in ids], labels


def practice(
    tokenizer: PreTrainedTokenizerBase, family: Family, rng: random.Random, longest: int
) -> tuple[list[int], list[int]]:
    """Questions about one table, each with its high-effort analysis; labels are the analyses."""
    ids: list[int] = []
    labels: list[int] = []
    for problem in _problems(family, rng, 12):
        content = problem.messages[-1]["content"]
        question = _ids(tokenizer, content if not ids else "\n" + _question(problem))
        analysis = _ids(tokenizer, family.analysis(problem, "high"))
        if len(ids) + len(question) + len(analysis) <= longest:
            ids += question + analysis
            labels += [IGNORED] * len(question) + analysis
    return ids, labels


def supervised(
    tokenizer: PreTrainedTokenizerBase, family: Family, rng: random.Random, longest: int, efforts: Mapping[str, float]
) -> tuple[list[int], list[int]]:
    """Conversations about one table, one after the other; labels are the assistant's tokens.

    Only the first shows the table, so that most tokens of a batch teach something.
    """
    ids: list[int] = []
    labels: list[int] = []
    for problem in _problems(family, rng, 12):
        effort = rng.choices(list(efforts), list(efforts.values()))[0]
        pairs = problem if not ids else Problem(family.name, _only_question(problem), problem.answer)
        prompt = _ids(tokenizer, render_prompt(tokenizer, pairs, effort))
        answer = _ids(tokenizer, family.trace(problem, effort))
        if len(ids) + len(prompt) + len(answer) <= longest:
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
    return ids, labels


def collate(sequences: Sequences, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Pads on the right; padding is never a label."""
    longest = max(len(ids) for ids, _ in sequences)
    pad = int(tokenizer.pad_token_id or 0)
    ids_BT = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in sequences])
    labels_BT = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in sequences])
    return {"input_ids": ids_BT, "labels": labels_BT}


def _problems(family: Family, rng: random.Random, count: int) -> list[Problem]:
    """`count` training problems about one table, or a few less; at least one."""
    while True:
        kept = [problem for problem in family.problems(rng, count) if not is_held_out(problem)]
        if kept:
            return kept


def _question(problem: Problem) -> str:
    return problem.messages[-1]["content"].partition("\n")[2]


def _only_question(problem: Problem) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": "\n" + _question(problem)},)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
