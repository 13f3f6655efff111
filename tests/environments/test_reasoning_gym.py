"""reasoning_gym.py: seeded problems of a generator, its own scores, what is refused, and held-out problems."""

import inspect
import json
import pickle
import random
import re

import pytest

from lit_puzzle.environments.environment import draw, is_held_out
from lit_puzzle.environments.reasoning_gym import EVALUATING, TAG_REQUEST, ReasoningGym

pytest.importorskip("reasoning_gym", reason="pip install 'lit-puzzle[reasoning-gym]'")

SMALL = {"min_terms": 2, "max_terms": 2, "max_digits": 2, "allow_negation": False}


def test_problems_follow_from_the_seeds_and_are_right_by_arithmetic() -> None:
    one, same, other = (ReasoningGym("chain_sum", seed=seed, settings=SMALL) for seed in (0, 0, 1))
    drawn = [[env.problem(random.Random(5)) for _ in range(3)] for env in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    for _ in range(20):
        problem = one.problem(random.Random(_))
        sum_of = re.search(r"(\d+) ([+-]) (\d+)\s=", problem.question())
        assert sum_of is not None
        left, sign, right = int(sum_of[1]), sum_of[2], int(sum_of[3])
        total = left + right if sign == "+" else left - right
        assert json.loads(problem.answer)["answer"] == str(total)
        assert one.verify(str(total), problem.answer) == 1.0 and one.verify(str(total + 1), problem.answer) < 1.0


def test_both_splits_are_drawn_and_do_not_meet() -> None:
    environment = ReasoningGym("chain_sum", settings=SMALL)
    held_out = draw([environment], ["none"], 16, 0, held_out=True)
    training = draw([environment], ["none"], 64, 0, held_out=False)
    assert all(is_held_out(problem) for problem, _ in held_out)
    assert not {p.question() for p, _ in held_out} & {p.question() for p, _ in training}


def test_what_of_a_text_is_scored() -> None:
    by = {extract: ReasoningGym("chain_sum", settings=SMALL, extract=extract) for extract in ("text", "number", "tag")}
    problem = by["text"].problem(random.Random(0))
    right = json.loads(problem.answer)["answer"]
    sentence = f"The sum is\n{int(right):,}."
    assert by["number"].verify(sentence, problem.answer) == 1.0
    assert 0 < by["text"].verify(sentence, problem.answer) < 1  # the generator's share for a longer text
    assert by["tag"].verify(sentence, problem.answer) == 0.0
    assert by["tag"].verify(f"<answer>1</answer> no, <answer> {right} </answer>", problem.answer) == 1.0
    assert by["number"].verify("none", problem.answer) == 0.0
    assert by["text"].verify("1" * 30_000, problem.answer) == 0.0
    whole = ReasoningGym("chain_sum", settings=SMALL, partial=False)
    assert whole.verify(sentence, problem.answer) == 0.0 and whole.verify(right, problem.answer) == 1.0
    assert by["tag"].problem(random.Random(0)).messages[0]["content"].endswith(TAG_REQUEST)
    asking = ReasoningGym("chain_sum", name="sums", settings=SMALL, request="Be brief.").problem(random.Random(0))
    assert asking.environment == "sums" and asking.messages[0]["content"].endswith("\nBe brief.")


@pytest.mark.parametrize(
    "generator", ["word_sorting", "gsm_symbolic", "basic_arithmetic", "knights_knaves", "mini_sudoku"]
)
def test_the_generators_own_answer_is_right(generator: str) -> None:
    environment = pickle.loads(pickle.dumps(ReasoningGym(generator)))  # as another process gets it
    for seed in range(3):
        problem = environment.problem(random.Random(seed))
        assert environment.verify(json.loads(problem.answer)["answer"], problem.answer) == 1.0


def test_generators_that_run_answers_as_code_are_refused() -> None:
    from reasoning_gym.factory import DATASETS

    evaluates = re.compile(r"\b(?:eval|exec|parse_expr)\((?!entry)")
    found = {name for name, (kind, _) in DATASETS.items() if evaluates.search(inspect.getsource(kind.score_answer))}
    assert found == set(EVALUATING)
    for name in EVALUATING:
        with pytest.raises(ValueError, match=f"{name} scores an answer by running it as Python code"):
            ReasoningGym(name)


def test_wrong_names_and_settings() -> None:
    with pytest.raises(ValueError, match=r"no generator 'chainsum'; .* the nearest are chain_sum"):
        ReasoningGym("chainsum")
    with pytest.raises(ValueError, match=r"chain_sum does not take the settings {'terms': 3}"):
        ReasoningGym("chain_sum", settings={"terms": 3})
    with pytest.raises(ValueError, match="does not take the settings"):
        ReasoningGym("chain_sum", settings={"min_terms": 3, "max_terms": 2})
