"""Teacher forcing: whether each token of a reference answer is the arg max of a policy after all tokens before it.

Teacher forcing misleads where
  - the reference's analysis says what the answer repeats: only `graded: completion` then tests the retrieval;
  - a right answer, or the analysis before it, has other forms than the reference: those tokens count as wrong, so a
    layer whose window changes only the manner looks as bad as one whose window loses the answer;
  - a model never answers without an analysis: its score is that of a habit it does not have, so compare it with its
    parent's only. An early mistake is also not carried on: teacher forcing is the milder test.

Reads and writes nothing. Memory beside the weights: one layer's activations of batch_size * tokens, and batch_size *
(reference tokens + 1) * vocabulary logits, and with eager attention query heads * batch_size * tokens^2: load long
contexts with `sink_attention`.

Shapes: B rows of a batch, T tokens of prompt and reference, R reference tokens.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.environments.answer_formats import AnswerFormat
from lit_puzzle.environments.environment import Environment, Problem
from lit_puzzle.generation.padding import pad_left
from lit_puzzle.generation.policy import evaluation_mode
from lit_puzzle.generation.stop_tokens import end_and_pad


@runtime_checkable
class WithTrace(Protocol):
    """An environment that can write a whole completion with a worked answer."""

    def trace(self, problem: Problem, effort: str) -> str:
        """Return the worked answer at an effort."""
        ...


def reference_answer(environment: Environment, problem: Problem, effort: str, form: AnswerFormat) -> str:
    """Return the environment's own completion with a worked answer, or the answer alone in the model's format."""
    if isinstance(environment, WithTrace):
        return environment.trace(problem, effort)
    return form.wrap(problem.answer)


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
                    logits_to_keep=torch.arange(-graded - 1, 0, device=policy.device),  # a slice is not contiguous
                )
                .logits[:, :-1]
                .argmax(-1)
            )
            right_BR = (guess_BR.cpu() == ids_BT[:, -graded:]).tolist()
            for row, right in zip(batch, right_BR, strict=True):
                hits[row] = right[graded - len(rows[row][1]) :]
    return hits
