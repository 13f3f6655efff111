"""The tiny world: answers against independent solvers, verified traces, a tokenizer that keeps all text."""

import ast
import random
import re
import zlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import EFFORTS, Problem, draw, is_held_out
from lit_puzzle.environments.harmony import parse_text
from lit_puzzle.tiny.tokenizer import SPECIAL_TOKENS, WORDS, build_tokenizer
from lit_puzzle.tiny.world import Chains, Counting, Family, Sorting, parse

FAMILIES: tuple[Family, ...] = (Chains(), Sorting(), Counting())


def drawn(family: Family, count: int = 200, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [family.problem(rng) for _ in range(count)]


def solved(problem: Problem) -> str:
    """Return the answer from the prompt's text by substitution and evaluation, unlike the families."""
    head, question = problem.messages[0]["content"].split("\n")
    values = dict(word.split("=", 1) for word in head.split()[1:])
    if question.startswith("value:"):
        text = question[len("value:") : -1]
        while re.search("[a-t]", text):
            text = re.sub("[a-t]", lambda found: values[found[0]], text)
        return str(sum(ast.literal_eval(number) for number in text.split("+")) % 10)
    letters = re.sub(r".*[:,]", "", question)[:-1]
    if question.startswith("order:"):
        return "".join(letter for digit in "0123456789" for letter in letters if values[letter] == digit)
    return str([values[letter] > question[len("above:")] for letter in letters].count(True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_answers_agree_with_another_solver(family: Family) -> None:
    problems = drawn(family)
    assert [problem.answer for problem in problems] == [solved(problem) for problem in problems]
    assert len({problem.answer for problem in problems}) >= 6
    assert all(problem.environment == family.name for problem in problems)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_traces_verify_at_every_effort_and_only_with_the_right_answer(family: Family) -> None:
    for problem in drawn(family, 40):
        for effort in EFFORTS:
            trace = family.trace(problem, effort)
            final = parse_text(trace).final
            assert final is not None and family.verify(final, problem.answer) == 1.0
            assert family.verify(final, problem.answer + "1") == 0.0
            assert parse_text(trace.removesuffix("<|return|>")).final is None


def test_analyses_of_a_problem_worked_by_hand() -> None:
    chain = Problem("chains", ({"role": "user", "content": "chains k=9 q=b+3 c=1 b=k+1\nvalue:q?"},), "3")
    table = "sorting q=7 b=2 k=5 c=2"
    order = Problem("sorting", ({"role": "user", "content": f"{table}\norder:qbk?"},), "bkq")
    count = Problem("counting", ({"role": "user", "content": f"{table}\nabove:4,qbk?"},), "2")
    assert Chains().analysis(chain, "medium") == " q=b+3 b=k+1 k=9"
    assert Chains().analysis(chain, "high") == " q=b+3 b=k+1 k=9 k:9 b=k+1 b:0 q=b+3 q:3"
    assert Sorting().analysis(order, "medium") == " q:7 b:2 k:5"
    assert Sorting().analysis(order, "high") == " q:7 b:2 k:5 | b:2 k:5 q:7"
    assert Counting().analysis(count, "medium") == " q:7 b:2 k:5"
    assert Counting().analysis(count, "high") == " q:7>1 b:2<1 k:5>2"
    for family, problem in zip(FAMILIES, (chain, order, count), strict=True):
        assert family.trace(problem, "low") == f"<|channel|>final<|message|>{problem.answer}<|return|>"
        assert solved(problem) == problem.answer


def test_sorting_has_different_values_and_chains_every_depth() -> None:
    for problem in drawn(FAMILIES[1]):
        table, letters, _ = parse(problem)
        assert len({table[letter][1] for letter in letters}) == len(letters)
    depths = {FAMILIES[0].analysis(problem, "medium").count("+") for problem in drawn(FAMILIES[0])}
    assert depths == {0, 1, 2, 3, 4}
    assert {FAMILIES[0].analysis(problem, "medium").count("+") for problem in drawn(Chains((0, 1, 0, 0, 0)), 20)} == {1}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_problems_of_one_table_differ_in_the_question_only(family: Family) -> None:
    problems = family.problems(random.Random(3), 6)
    assert len({problem.messages[0]["content"].split("\n")[0] for problem in problems}) == 1
    assert len({problem.text() for problem in problems}) > 1


def test_the_split_is_by_content() -> None:
    for problem, _ in draw(FAMILIES, ["high"], 24, seed=1, held_out=True):
        assert is_held_out(problem)
        assert zlib.crc32(f"user: {problem.messages[0]['content']}".encode()) % 8 == 0


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1, 1, -1), (0, 0, 0, 0, 0)])
def test_wrong_weights_and_other_text_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="depth_weights"):
        Chains(weights)
    with pytest.raises(ValueError, match="not a problem of the tiny world"):
        parse(Problem("chains", ({"role": "user", "content": "chains k=5\nvalue:q?"},), "5"))


def test_tokenizer_keeps_every_character_and_every_word_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    for family in FAMILIES:
        for problem in drawn(family, 30):
            for effort in EFFORTS:
                text = render_prompt(tokenizer, problem, effort) + family.trace(problem, effort)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(tokenizer) == len(set(WORDS)) + len(SPECIAL_TOKENS) <= 128
    assert all(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in (*SPECIAL_TOKENS, *WORDS))
    assert tokenizer.unk_token_id in tokenizer("Zebra", add_special_tokens=False)["input_ids"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|return|>")


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    user = {"role": "user", "content": "Q"}
    head = "<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>Q<|end|>"
    assert tokenizer.apply_chat_template([user], tokenize=False) == head
    at_high = {"add_generation_prompt": True, "reasoning_effort": "high"}
    assert (
        tokenizer.apply_chat_template([user], tokenize=False, **at_high)
        == head.replace("medium", "high") + "<|start|>assistant"
    )
    for family in FAMILIES:
        problem = drawn(family, 1)[0]
        reply = {"role": "assistant", "content": problem.answer, "thinking": family.analysis(problem, "high")}
        text = tokenizer.apply_chat_template([user, reply], tokenize=False)
        assert text == head + "<|start|>assistant" + family.trace(problem, "high")
    with pytest.raises(Exception, match="reasoning_effort is low, medium or high"):
        tokenizer.apply_chat_template([user], tokenize=False, reasoning_effort="extreme")
    with pytest.raises(Exception, match="message roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "Q"}], tokenize=False)
