"""long_tables.py: exact lengths, the short problem's answer and solution, other letters between, refusals."""

import random
from typing import Literal

import pytest

from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import draw
from lit_puzzle.environments.long_context_text import problem_of
from lit_puzzle.evaluate.long_context import LongContextAccuracy
from lit_puzzle.evaluate.long_context_settings import Grading, LongContextProblems
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.tiny.long_tables import LongTable
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import TABLE_SIZE, Chains, Counting, Family, Sorting, parse

TOKENIZER = build_tokenizer()
FAMILIES = [Chains(), Sorting(), Counting()]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("tokens", [100, 777, 2048])
def test_prompts_have_the_length(family: Family, tokens: int) -> None:
    task = LongTable(family, tokens)
    for problem, effort in draw([task], ["high"], 3, seed=0, held_out=True):
        ids = TOKENIZER(render_prompt(TOKENIZER, problem, effort))["input_ids"]
        assert tokens - 1 <= len(ids) <= tokens
        assert TOKENIZER.unk_token_id not in ids and problem.environment == f"{family.name}_{tokens}"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_it_is_the_short_problem_with_other_letters_between(family: Family) -> None:
    task = LongTable(family, 500)
    draft = task.draft(random.Random(3))
    bare, long = problem_of(task, draft, 0), problem_of(task, draft, 150)
    short = family.problem(random.Random(3))
    assert bare.messages == short.messages and bare.answer == short.answer == long.answer
    table, letters, _ = parse(short)
    whole, same_letters, _ = parse(long)
    assert {letter: whole[letter] for letter in table} == table and same_letters == letters
    assert len(table) == TABLE_SIZE and set(whole) > set(table)
    for effort in ("low", "medium", "high"):
        assert task.trace(long, effort) == family.trace(short, effort)
    assert task.verify(short.answer, short.answer) == 1.0 and task.verify("x", short.answer) == 0.0
    # the needles lie at even depths, in their order
    places = [long.messages[0]["content"].index(needle) for needle in draft.needles]
    assert places == sorted(places) and places[-1] - places[0] > 0.8 * len(long.messages[0]["content"])


def test_a_table_that_does_not_fit_and_no_length_are_refused() -> None:
    with pytest.raises(ValueError, match="context_tokens is 30, but the needles and the question alone are"):
        LongTable(Sorting(), 30).problem(random.Random(0))
    with pytest.raises(ValueError, match="context_tokens 0 was given"):
        LongTable(Sorting(), 0)


@pytest.mark.parametrize(("mode", "lengths"), [("generated", {395, 396}), ("teacher_forced", {313, 314})])
def test_windows_can_be_scored_on_them(mode: Literal["generated", "teacher_forced"], lengths: set[int]) -> None:
    """Prompts of 300 tokens, or one less, and behind them 96 tokens, or the 14 of the reference."""
    problems = LongContextProblems([LongTable(Chains(), 300)], context_tokens=300, problems_per_effort=3)
    accuracy = LongContextAccuracy(problems, Grading(mode), Sampling(96))
    tokens = accuracy.tokens(TOKENIZER, accuracy.items(TOKENIZER))
    assert len(tokens) == 3 and set(tokens) <= lengths
