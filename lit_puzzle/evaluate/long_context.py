"""Long-context accuracy of a policy: how much of what it reads it still finds, follows and counts.

The damage of a windowed layer is the drop of this score: the ordinary scores, means over all tokens, hardly see what is
lost far back. Items are problems at one or more efforts: texts of an exact number of tokens (`tasks`), or any of the
project's environments (`environments`), whose prompts are as long as they are. Training problems only: an architecture
must not be chosen on the problems it is judged by.

    generated       the policy answers greedily; score = `verify`, 0 or 1
    teacher_forced  one forward pass over prompt + reference answer, no decoding; score = share (`credit: share`) of the
                    graded tokens that are the arg max at their place, or whether all are (`credit: exact`)

The reference is the environment's worked answer (`trace`) where it has one, else the final channel with the answer.
Graded are the answer in the final channel (`graded: answer`), or all tokens of the reference (`graded: completion`).
Teacher forcing misleads where
  - the reference's analysis says what the answer repeats: only `graded: completion` then tests the retrieval;
  - a right answer, or the analysis before it, has other forms than the reference: those tokens count as wrong, so a
    layer whose window changes only the manner looks as bad as one whose window loses the answer;
  - a model never answers without an analysis: its score is that of a habit it does not have, so compare it with its
    parent's only. An early mistake is also not carried on: teacher forcing is the milder test.
With `graded: completion, credit: exact` the score is 1 exactly where greedy decoding writes the reference.

Reads and writes nothing. Memory beside the weights: generated, the KV cache of a batch: batch_size * 2 * KV heads *
head_dim * bytes per value * sum over layers of min(window, prompt + max_new_tokens); teacher-forced, one layer's
activations of batch_size * tokens, and batch_size * (reference tokens + 1) * vocabulary logits, no more. With eager
attention both add query heads * batch_size * tokens^2 in the prompt's pass: load long contexts with `sink_attention`.
Source: arXiv 2602.11937 (a window's damage is its drop of long-context accuracy).

Shapes: B rows of a batch, T tokens of prompt and reference, R reference tokens, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.environments.environment import Environment, Problem, draw, effort_weights, render_prompt
from lit_puzzle.environments.long_context_tasks import default_tasks
from lit_puzzle.environments.long_context_text import TextTask, fit
from lit_puzzle.evaluate.accuracy import answer_problems
from lit_puzzle.generation.batches import end_and_pad, evaluation_mode, pad_left

FINAL = "<|channel|>final<|message|>"
RETURN = "<|return|>"

Item = tuple[Problem, str]  # a problem and an effort
Mode = Literal["generated", "teacher_forced"]


@runtime_checkable
class WithTrace(Protocol):
    """An environment that can write a whole worked answer, from the first channel to ``<|return|>``."""

    def trace(self, problem: Problem, effort: str) -> str:
        """The worked answer at an effort."""
        ...


class LongContextAccuracy:
    """Scores in [0, 1] of a policy on long-context problems.

    Args:
        tasks: Text tasks, laid out to `context_tokens`; None: one of each kind, unless there are `environments`.
        environments: Other environments, whose prompts are taken as they are (the tiny world's, a file of AA-LCR ...).
        context_tokens: Tokens of a text task's whole prompt; with the answer it must fit the parent's context.
        efforts: Reasoning efforts; each is asked the same problems.
        problems_per_effort: Problems at each effort; tasks and environments take turns.
        mode: `generated` or `teacher_forced`.
        graded: Teacher-forced: the `answer` in the final channel, or the whole `completion`.
        credit: Teacher-forced: the `share` of right tokens, or 1 if the match is `exact`.
        max_new_tokens: Generated: an answer is cut off there, and counts as wrong.
        batch_size: Prompts read together.
        seed: Which problems.
        name: Of the metric.

    Raises:
        ValueError: Nothing to ask, names used twice, no `context_tokens` for text tasks, or counts below 1.
    """

    def __init__(
        self,
        tasks: list[TextTask] | None = None,
        environments: list[Environment] | None = None,
        context_tokens: int | None = None,
        efforts: list[str] | None = None,
        problems_per_effort: int = 48,
        mode: Mode = "generated",
        graded: Literal["answer", "completion"] = "answer",
        credit: Literal["share", "exact"] = "share",
        max_new_tokens: int = 96,
        batch_size: int = 32,
        seed: int = 0,
        name: str = "long_context",
    ) -> None:
        self.name = name
        self.environments = list(environments or [])
        self.tasks = default_tasks() if tasks is None and not self.environments else list(tasks or [])
        self.context_tokens = context_tokens
        self.efforts = list(effort_weights(["high"] if efforts is None else efforts))
        self.problems_per_effort = problems_per_effort
        self.mode = mode
        self.graded = graded
        self.credit = credit
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.seed = seed
        self._check()

    def _check(self) -> None:
        names = [environment.name for environment in self._all()]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{self.name}: tasks and environments {names}: at least one is needed, names must differ.")
        if self.tasks and self.context_tokens is None:
            raise ValueError(
                f"{self.name}: context_tokens is missing: give the length of the text tasks' prompts in tokens."
            )
        context = 1 if self.context_tokens is None else self.context_tokens
        counts = (self.problems_per_effort, self.max_new_tokens, self.batch_size, context)
        if min(counts) < 1:
            raise ValueError(
                f"{self.name}: problems_per_effort, max_new_tokens, batch_size and context_tokens must be 1 or more, "
                f"got {counts}."
            )
        choices = {"mode": ("generated", "teacher_forced"), "graded": ("answer", "completion")}
        for setting, allowed in {**choices, "credit": ("share", "exact")}.items():
            given = {"mode": self.mode, "graded": self.graded, "credit": self.credit}[setting]
            if given not in allowed:
                raise ValueError(f"{self.name}: {setting} is {given!r}; allowed: {list(allowed)}.")

    def _all(self) -> list[Environment]:
        return [*self.tasks, *self.environments]

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """The problems at every effort, one effort after the other; equal arguments give equal items.

        Raises:
            ValueError: `context_tokens` is more than the tokenizer says its model reads, or less than a task needs.
        """
        if self.context_tokens is not None and self.context_tokens > tokenizer.model_max_length:
            raise ValueError(
                f"{self.name}: context_tokens is {self.context_tokens}; the tokenizer's model_max_length is "
                f"{tokenizer.model_max_length}. Ask for a shorter context."
            )
        sources = len(self._all())
        shares = [len(range(index, self.problems_per_effort, sources)) for index in range(sources)]
        problems = [
            self._texts(tokenizer, task, share)
            for task, share in zip(self.tasks, shares[: len(self.tasks)], strict=True)
        ]
        for environment, share in zip(self.environments, shares[len(self.tasks) :], strict=True):
            pairs = draw([environment], [self.efforts[0]], share, self.seed, held_out=False)
            problems.append([problem for problem, _ in pairs])
        turns = [group[turn] for turn in range(max(shares)) for group in problems if turn < len(group)]
        return [(problem, effort) for effort in self.efforts for problem in turns]

    def _texts(self, tokenizer: PreTrainedTokenizerBase, task: TextTask, count: int) -> list[Problem]:
        """Problems of one task at the asked length, their needles stepping evenly through all depths."""
        assert self.context_tokens is not None
        rng = random.Random(f"long context {self.seed} {task.name}")
        problems = []
        for index in range(count):
            draft = replace(task.draft(rng), offset=(index + 0.5) / count)
            length = Length(tokenizer, self.efforts)
            problems.append(fit(task, draft, length, self.context_tokens))
        return problems

    def scores(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[float]:
        """One score for each item, in their order.

        Deterministic; the modules' train/eval modes and the random state are left as they were. Over processes each
        scores its own items, with gathered (unsharded) weights.

        Raises:
            ValueError: An item and its answer are longer than the policy's context, or of an unknown environment.
        """
        answers = self._references(tokenizer, items) if self.mode == "teacher_forced" else []
        prompts = [_ids(tokenizer, render_prompt(tokenizer, problem, effort)) for problem, effort in items]
        new = [len(head) + len(tail) for head, tail in answers] or [self.max_new_tokens] * len(items)
        self._check_context(policy, max((len(ids) + more for ids, more in zip(prompts, new, strict=True)), default=0))
        if self.mode == "generated":
            episodes = answer_problems(policy, tokenizer, items, self._all(), self.max_new_tokens, self.batch_size)
            return [episode.correct for episode in episodes]
        rows = [(prompt + head, tail) for prompt, (head, tail) in zip(prompts, answers, strict=True)]
        hits = teacher_forced_hits(policy, tokenizer, rows, self.batch_size)
        return [float(all(hit)) if self.credit == "exact" else sum(hit) / len(hit) for hit in hits]

    def _check_context(self, policy: PreTrainedModel, longest: int) -> None:
        context = int(policy.config.max_position_embeddings)
        if longest > context:
            raise ValueError(
                f"{self.name}: a prompt with its answer has {longest} tokens; the model's context holds {context} "
                f"(max_position_embeddings). Set context_tokens to at most {context} less the answer's tokens."
            )

    def _references(
        self, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> list[tuple[list[int], list[int]]]:
        """For each item the reference's tokens that are given to the policy, and those that are graded."""
        by_name = {environment.name: environment for environment in self._all()}
        unknown = sorted({problem.environment for problem, _ in items} - set(by_name))
        if unknown:
            raise ValueError(f"{self.name}: items of environments {unknown}; the environments are {sorted(by_name)}.")
        references: list[tuple[list[int], list[int]]] = []
        for problem, effort in items:
            text = reference_answer(by_name[problem.environment], problem, effort)
            if self.graded == "completion":
                references.append(([], _ids(tokenizer, text)))
            else:
                head, _, answer = text.rpartition(FINAL)
                references.append((_ids(tokenizer, head + FINAL), _ids(tokenizer, answer.removesuffix(RETURN))))
        return references


class Length:
    """Counts a problem's prompt in tokens, at the effort that needs most.

    Args:
        tokenizer: With its chat template.
        efforts: The efforts at which the problem will be asked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, efforts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.efforts = efforts

    def __call__(self, problem: Problem) -> int:
        """Tokens of the prompt."""
        return max(len(_ids(self.tokenizer, render_prompt(self.tokenizer, problem, effort))) for effort in self.efforts)


def reference_answer(environment: Environment, problem: Problem, effort: str) -> str:
    """The environment's own worked answer if it has one, else its answer in the final channel and nothing else."""
    if isinstance(environment, WithTrace):
        return environment.trace(problem, effort)
    return f"{FINAL}{problem.answer}{RETURN}"


def teacher_forced_hits(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
) -> list[list[bool]]:
    """For each row (given tokens, graded tokens) whether each graded token is the arg max after all before it.

    Rows are padded on the left, so that all graded tokens are last and logits are made for those places only.
    """
    _, pad_id = end_and_pad(policy, tokenizer)
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row][0]) + len(rows[row][1]), row))
    hits: list[list[bool]] = [[] for _ in rows]
    with evaluation_mode(policy), torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids_BT, mask_BT = pad_left([[*rows[row][0], *rows[row][1]] for row in batch], pad_id)
            graded = max(len(rows[row][1]) for row in batch)
            guess_BR = (
                policy(
                    input_ids=ids_BT.to(policy.device),
                    attention_mask=mask_BT.to(policy.device),
                    position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0).to(policy.device),
                    use_cache=False,
                    logits_to_keep=graded + 1,
                )
                .logits[:, :-1]
                .argmax(-1)
            )
            right_BR = (guess_BR.cpu() == ids_BT[:, -graded:]).tolist()
            for row, right in zip(batch, right_BR, strict=True):
                hits[row] = right[graded - len(rows[row][1]) :]
    return hits


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
