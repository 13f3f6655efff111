"""Long-context accuracy of a policy: how much of what it reads it still finds, follows and counts.

A windowed layer costs the drop of this score: the ordinary scores, means over all tokens, hardly see what is lost far
back. Items are problems at one or more efforts: texts of an exact number of tokens (`tasks`), or any of the
project's environments (`environments`), whose prompts are as long as they are. Training problems only: an architecture
must not be chosen on the problems it is judged by.

    generated       the policy completes the prompt, greedily by default; score = `verify`, 0 or 1
    teacher_forced  one forward pass over prompt + reference answer, no decoding; score = share (`credit: share`) of the
                    graded tokens that are the arg max at their place, or whether all are (`credit: exact`)

The reference is the environment's worked answer (`trace`) where it has one, else the final channel with the answer.
Graded are the answer in the final channel (`graded: answer`), or all tokens of the reference (`graded: completion`).
With `graded: completion, credit: exact` the score is 1 exactly where greedy decoding writes the reference. Where
teacher forcing misleads: `lit_puzzle.evaluate.teacher_forcing`.

With an `engine`, the stage `score` lets it generate, in processes of its own (vLLM, on every GPU).

Reads and writes nothing. Memory beside the weights: generated, see `lit_puzzle.generation.transformers_engine`;
teacher-forced, see `lit_puzzle.evaluate.teacher_forcing`.
Source: arXiv 2602.11937 (a window's score is its drop of long-context accuracy).
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.environments.answer_formats import answer_format, fix_format
from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import Environment, Problem, PromptAtEffort, draw
from lit_puzzle.environments.long_context_text import TextTask, fit
from lit_puzzle.evaluate.long_context_settings import Grading, LongContextProblems
from lit_puzzle.evaluate.solving import solve_problems
from lit_puzzle.evaluate.teacher_forcing import reference_answer, teacher_forced_hits
from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.model.tokens import token_ids


class LongContextAccuracy:
    """Scores in [0, 1] of a policy on long-context problems.

    Args:
        problems: which problems.
        grading: how it is graded.
        sampling: how completions are drawn, where they are generated; one that the cap cuts off counts as wrong.
        batch_size: prompts read, or completions generated, together.
        name: of the metric.
        engine: what generates in `score`, from a checkpoint folder of each candidate, with a batch size of its own;
            None: the parent in memory, by transformers.

    Raises:
        ValueError: no prompts in a batch, log-probabilities, which an evaluation has no use for, or an engine that is
            to be teacher-forced.
    """

    def __init__(
        self,
        problems: LongContextProblems,
        grading: Grading = Grading(),  # noqa: B008  (frozen)
        sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008
        batch_size: int = 32,
        name: str = "long_context",
        engine: EngineSettings | None = None,
    ) -> None:
        sampling.refuse_logprobs(f"{name}: an evaluation")
        if batch_size < 1:
            raise ValueError(f"{name}: batch_size {batch_size} was given; 1 or more is needed.")
        if engine is not None and grading.mode == "teacher_forced":
            raise ValueError(
                f"{name}: engine {engine.name} was given with grading.mode teacher_forced, which reads the model's own "
                "logits. Leave engine out, or choose mode: generated."
            )
        if engine is not None:
            engine.refuse_server(f"{name}: engine")
        self.name = name
        self.engine = engine
        self.problems = problems
        self.grading = grading
        self.sampling = sampling
        self.batch_size = batch_size
        self.tasks = problems.text_tasks()
        self.environments = list(problems.environments or [])

    def _all(self) -> list[Environment]:
        return [*self.tasks, *self.environments]

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[PromptAtEffort]:
        """Return the problems at every effort, one effort after the other; equal settings give equal items.

        Raises:
            ValueError: `context_tokens` is more than the tokenizer says its model reads, or less than a task needs.
        """
        wanted, sources = self.problems, len(self._all())
        if wanted.context_tokens is not None and wanted.context_tokens > tokenizer.model_max_length:
            raise ValueError(
                f"{self.name}: context_tokens is {wanted.context_tokens}; the tokenizer's model_max_length is "
                f"{tokenizer.model_max_length}. Ask for a shorter context."
            )
        shares = [len(range(index, wanted.problems_per_effort, sources)) for index in range(sources)]
        problems = [
            self._texts(tokenizer, task, share)
            for task, share in zip(self.tasks, shares[: len(self.tasks)], strict=True)
        ]
        for environment, share in zip(self.environments, shares[len(self.tasks) :], strict=True):
            pairs = draw([environment], [wanted.efforts[0]], share, wanted.seed, held_out=False)
            problems.append([problem for problem, _ in pairs])
        turns = [group[turn] for turn in range(max(shares)) for group in problems if turn < len(group)]
        return [(problem, effort) for effort in wanted.efforts for problem in turns]

    def tokens(self, tokenizer: PreTrainedTokenizerBase, items: Sequence[PromptAtEffort]) -> list[int]:
        """Return the most tokens that prompt and completion of each item have."""
        return self._lengths(*self._rendered(tokenizer, items))

    def _rendered(
        self, tokenizer: PreTrainedTokenizerBase, items: Sequence[PromptAtEffort]
    ) -> tuple[list[list[int]], list[tuple[list[int], list[int]]]]:
        """Return the tokens of each prompt, and its reference (`_references`) where answers are teacher-forced."""
        references = self._references(tokenizer, items) if self.grading.mode == "teacher_forced" else []
        prompts = [token_ids(tokenizer, render_prompt(tokenizer, problem, effort)) for problem, effort in items]
        return prompts, references

    def _lengths(self, prompts: list[list[int]], references: list[tuple[list[int], list[int]]]) -> list[int]:
        forced = [len(given) + len(graded) for given, graded in references]
        new = forced or [self.sampling.max_new_tokens] * len(prompts)
        return [len(ids) + more for ids, more in zip(prompts, new, strict=True)]

    def _texts(self, tokenizer: PreTrainedTokenizerBase, task: TextTask, count: int) -> list[Problem]:
        """Return problems of one task of the wanted length, their needles stepping evenly through all depths."""
        wanted = self.problems
        assert wanted.context_tokens is not None
        rng = random.Random(f"long context {wanted.seed} {task.name}")
        problems = []
        for index in range(count):
            draft = replace(task.draft(rng), offset=(index + 0.5) / count)
            problems.append(fit(task, draft, Length(tokenizer, wanted.efforts), wanted.context_tokens))
        return problems

    def scores(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[PromptAtEffort]
    ) -> list[float]:
        """Return one score for each item, in their order.

        Deterministic; the modules' train/eval modes and the random state are left as they were. Over processes each
        scores its own items; a sampled completion depends on its item, not on the process or the place.

        Raises:
            ValueError: an item and its completion are longer than the policy's context, or of an unknown environment.
        """
        return self.values(policy, tokenizer, items)["score"]

    def efforts(self, items: Sequence[PromptAtEffort]) -> list[str]:
        """Return the reasoning effort of each item."""
        return [effort for _, effort in items]

    def values(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[PromptAtEffort]
    ) -> dict[str, list[float]]:
        """Return `score` of each item as `scores` does; of generated completions also `tokens`, `cut` and `looping`."""
        grading = self.grading
        prompts, references = self._rendered(tokenizer, items)
        self._check_context(policy, max(self._lengths(prompts, references), default=0))
        if grading.mode == "generated":
            return self.values_by_engine(TransformersEngine(policy, tokenizer, self.batch_size), tokenizer, items)
        forced = [(prompt + head, tail) for prompt, (head, tail) in zip(prompts, references, strict=True)]
        hits = teacher_forced_hits(policy, tokenizer, forced, self.batch_size)
        return {"score": [float(all(hit)) if grading.credit == "exact" else sum(hit) / len(hit) for hit in hits]}

    def scores_by_engine(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, items: Sequence[PromptAtEffort]
    ) -> list[float]:
        """Return one score for each item, in their order, from completions of an engine.

        Raises:
            ValueError: an item and its completion are longer than the model's context, or of an unknown environment.
        """
        return self.values_by_engine(engine, tokenizer, items)["score"]

    def values_by_engine(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, items: Sequence[PromptAtEffort]
    ) -> dict[str, list[float]]:
        """Return `score`, `tokens`, `cut` and `looping` of each item as `scores_by_engine` does."""
        if self.grading.answer_format != "auto":
            fix_format(tokenizer, self.grading.answer_format)
        rows = [zlib.crc32(f"{effort} {problem.text()}".encode()) for problem, effort in items]
        episodes = solve_problems(engine, tokenizer, items, self._all(), self.sampling, rows)
        return {
            "score": [episode.correct for episode in episodes],
            "tokens": [float(episode.generated_tokens) for episode in episodes],
            "cut": [float(not episode.finished) for episode in episodes],
            "looping": [float(episode.looping or False) for episode in episodes],
        }

    def _check_context(self, policy: PreTrainedModel, longest: int) -> None:
        context = int(policy.config.max_position_embeddings)
        if longest > context:
            raise ValueError(
                f"{self.name}: a prompt with its completion has {longest} tokens; the model's context holds {context} "
                f"(max_position_embeddings). Set context_tokens to at most {context} less the completion's tokens."
            )

    def _references(
        self, tokenizer: PreTrainedTokenizerBase, items: Sequence[PromptAtEffort]
    ) -> list[tuple[list[int], list[int]]]:
        """Return for each item the reference's tokens that are given to the policy, and those that are graded."""
        if self.grading.answer_format != "auto":
            fix_format(tokenizer, self.grading.answer_format)
        form = answer_format(tokenizer)
        by_name = {environment.name: environment for environment in self._all()}
        unknown = sorted({problem.environment for problem, _ in items} - set(by_name))
        if unknown:
            raise ValueError(f"{self.name}: items of environments {unknown}; the environments are {sorted(by_name)}.")
        references: list[tuple[list[int], list[int]]] = []
        for problem, effort in items:
            text = reference_answer(by_name[problem.environment], problem, effort, form)
            if self.grading.graded == "completion":
                references.append(([], token_ids(tokenizer, text)))
            else:
                graded = form.parse(text).final or ""
                given = text.removesuffix(form.end).removesuffix(graded)
                references.append((token_ids(tokenizer, given), token_ids(tokenizer, graded)))
        return references


class Length:
    """Counts a problem's prompt in tokens, at the effort that needs most.

    Args:
        tokenizer: With its chat template.
        efforts: the efforts of its prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, efforts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.efforts = efforts

    def __call__(self, problem: Problem) -> int:
        """Tokens of the prompt."""
        return max(
            len(token_ids(self.tokenizer, render_prompt(self.tokenizer, problem, effort))) for effort in self.efforts
        )
