"""Lessons that teach the tiny world to a model from scratch, in three phases; each batch depends only on its step.

    retrieval    a table of 3 to 16 definitions, then the same definitions in other orders: predict each right-hand side
    practice     a table, then questions with their high-effort analyses as plain text: predict analyses
    supervised   conversations about one table at mixed efforts: predict the assistant's tokens

The later phases need retrieval, which is learned many times faster if tables are short at first. Held-out problems are
never shown.

Reads and writes nothing. Source: this project's own. Shapes: B sequences of a batch, T tokens.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import Problem, is_held_out
from lit_puzzle.tiny.long_tables import LongTable
from lit_puzzle.tiny.settings import Curriculum
from lit_puzzle.tiny.world import TABLE_SIZE, Family, define, parse

IGNORED = -100
Sequences = list[tuple[list[int], list[int]]]  # (token ids, labels) each


class Lessons(IterableDataset[dict[str, Tensor]]):
    """Batches of the curriculum: `input_ids` and `labels`, both (B, T).

    A batch depends only on the seed and its step, so a resumed run gets the same batches as an uninterrupted one.

    Args:
        curriculum: phases and contents of a batch.
        families: environments that are taught.
        tokenizer: tokenizer of the tiny world.
        seed: seed of the lessons.
        first_step: first step.
        last_step: step after the last one.
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
        """Return the batch of one step."""
        rng = random.Random(f"lessons {self.seed} {step}")
        curriculum = self.curriculum
        sequences: Sequences = []
        for index in range(curriculum.sequences):
            family = self.families[index % len(self.families)]
            if step < curriculum.retrieval_steps:
                sequences.append(retrieval(self.tokenizer, family, rng, curriculum.entries(step)))
            elif step < curriculum.retrieval_steps + curriculum.practice_steps:
                sequences.append(practice(self.tokenizer, family, rng, curriculum.sequence_tokens))
            else:
                longest, efforts = curriculum.sequence_tokens, curriculum.efforts
                sequences.append(supervised(self.tokenizer, family, rng, longest, efforts))
        return collate(sequences, self.tokenizer)


def retrieval(
    tokenizer: PreTrainedTokenizerBase, family: Family, rng: random.Random, entries: int
) -> tuple[list[int], list[int]]:
    """Return a table and its definitions again, reordered; labels are the tokens after each ` q=` of the copies."""
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
    """Return questions about one table, each with its high-effort analysis; labels are the analyses."""
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
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    rng: random.Random,
    longest: int,
    efforts: Mapping[str, float],
    most: int = 12,
    context_tokens: int | None = None,
) -> tuple[list[int], list[int]]:
    """Return at most `most` conversations about one table, one after the other; labels are the assistant's tokens.

    Only the first conversation contains the table, so that most tokens of a batch are labels. With `context_tokens` its
    prompt is that long: the table stands among definitions that nobody asks about (`lit_puzzle.tiny.long_tables`).
    """
    ids: list[int] = []
    labels: list[int] = []
    for problem in _problems(family, rng, most):
        effort = rng.choices(list(efforts), list(efforts.values()))[0]
        shown = problem
        if ids:
            shown = Problem(family.name, _only_question(problem), problem.answer)
        elif context_tokens:
            shown = _lengthened(family, problem, context_tokens, rng)
        prompt = _ids(tokenizer, render_prompt(tokenizer, shown, effort))
        completion = _ids(tokenizer, family.trace(problem, effort))
        if len(ids) + len(prompt) + len(completion) <= longest:
            ids += prompt + completion
            labels += [IGNORED] * len(prompt) + completion
    return ids, labels


def collate(sequences: Sequences, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Pad sequences on the right; padding is never a label."""
    longest = max(len(ids) for ids, _ in sequences)
    pad = int(tokenizer.pad_token_id or 0)
    ids_BT = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in sequences])
    labels_BT = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in sequences])
    return {"input_ids": ids_BT, "labels": labels_BT}


def _problems(family: Family, rng: random.Random, count: int) -> list[Problem]:
    """Draw up to `count` training problems about one table, at least one: held-out problems are left out."""
    while True:
        kept = [problem for problem in family.problems(rng, count) if not is_held_out(problem)]
        if kept:
            return kept


def _lengthened(family: Family, problem: Problem, context_tokens: int, rng: random.Random) -> Problem:
    """Return the problem in a prompt of so many tokens that is not held out."""
    while is_held_out(long := LongTable(family, context_tokens).lengthened(problem, rng)):
        pass
    return long


def _question(problem: Problem) -> str:
    return problem.messages[-1]["content"].partition("\n")[2]


def _only_question(problem: Problem) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": "\n" + _question(problem)},)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
