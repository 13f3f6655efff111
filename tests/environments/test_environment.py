"""environments.py: the split by content, drawing, the final channel, and verification of users' own files."""

import random
import zlib
from typing import Any

import pytest

from lit_puzzle.environments.environment import Environment, Problem, draw, effort_weights, is_held_out
from lit_puzzle.tiny.world import Chains, Counting, Sorting


class Sums:
    """Adds two numbers below `limit`: limit squared different problems."""

    def __init__(self, name: str = "sums", limit: int = 100) -> None:
        self.name = name
        self.limit = limit

    def problem(self, rng: random.Random) -> Problem:
        a, b = rng.randrange(self.limit), rng.randrange(self.limit)
        return Problem(self.name, ({"role": "user", "content": f"{self.name} {a}+{b}"},), str(a + b))

    def verify(self, final: str, problem_answer: str) -> float:
        return float(final == problem_answer)


def by_hand_held_out(name: str, a: int, b: int) -> bool:
    """The last word of a question stands in a line of its own."""
    return zlib.crc32(f"user: {name}\n{a}+{b}".encode()) % 8 == 0


def test_split_is_crc32_of_the_question_and_about_one_in_eight() -> None:
    rng = random.Random(0)
    problems = [Sums().problem(rng) for _ in range(4000)]
    sums = [problem.messages[0]["content"].split()[1].split("+") for problem in problems]
    by_hand = [by_hand_held_out("sums", int(a), int(b)) for a, b in sums]
    assert [is_held_out(problem) for problem in problems] == by_hand
    assert 0.10 < sum(by_hand) / len(by_hand) < 0.15


def test_training_and_held_out_problems_never_meet_whatever_the_seed() -> None:
    train = {p.text() for seed in range(3) for p, _ in draw([Sums()], ["low"], 500, seed, held_out=False)}
    held_out = {p.text() for seed in range(3) for p, _ in draw([Sums()], ["low"], 200, seed, held_out=True)}
    assert train and held_out and not train & held_out


def test_draw_is_deterministic_and_problems_do_not_depend_on_efforts() -> None:
    environments: list[Environment] = [Sums("a"), Sums("b")]
    mixed = draw(environments, {"low": 1.0, "high": 3.0}, 400, 7, held_out=False)
    assert mixed == draw(environments, {"low": 1.0, "high": 3.0}, 400, 7, held_out=False)
    assert mixed != draw(environments, {"low": 1.0, "high": 3.0}, 400, 8, held_out=False)
    assert [p for p, _ in mixed] == [p for p, _ in draw(environments, ["medium"], 400, 7, held_out=False)]
    assert [p.environment for p, _ in mixed[:4]] == ["a", "b", "a", "b"]
    assert 0.68 < sum(effort == "high" for _, effort in mixed) / 400 < 0.82


def test_held_out_problems_are_all_different_and_training_starts_over() -> None:
    small = Sums(limit=10)  # 100 problems
    available = {f"user: sums {a}+{b}" for a in range(10) for b in range(10)}
    held_out = {f"user: sums {a}+{b}" for a in range(10) for b in range(10) if by_hand_held_out("sums", a, b)}
    drawn = [p.text() for p, _ in draw([small], ["low"], len(held_out), 0, held_out=True)]
    assert sorted(drawn) == sorted(held_out)
    with pytest.raises(ValueError, match=f"{len(held_out)} different held-out problems"):
        draw([small], ["low"], len(held_out) + 1, 0, held_out=True)
    train = [p.text() for p, _ in draw([small], ["low"], 150, 0, held_out=False)]
    once = available - held_out
    assert set(train[: len(once)]) == once and len(train) == 150


@pytest.mark.parametrize(
    "efforts",
    [[], ["extreme"], ["low", "low"], {"low": -1.0}, {"low": 0.0}, {"low": float("nan")}, {"low": float("inf")}],
)
def test_bad_effort_mixes_are_refused(efforts: Any) -> None:
    with pytest.raises(ValueError, match=r"[Ee]ffort"):
        effort_weights(efforts)


def test_duplicate_or_no_environments_are_refused() -> None:
    for environments in ([], [Sums(), Sums()]):
        with pytest.raises(ValueError, match="names must differ"):
            draw(environments, ["low"], 1, 0, held_out=False)


VARIANTS = (
    "Was ist 3 + 4 ?",
    "  Was\tist  3\n+\r\n4 ? \n",
    "Was\u00a0ist 3 +\u20034\u3000?",
    "W\uff41s ist \uff13 + \u2074 \uff1f",  # full width and superscript: NFKC
    "Was\u200b ist\ufeff 3 + 4\u00ad ?",
    "Was\u3164 ist\U000e0041 3 + 4\U000e0101\u17b4 ?",  # a filler, a tag, a variation selector, an inherent vowel
)


@pytest.mark.parametrize("number", range(40))
def test_the_split_does_not_see_how_a_question_is_written(number: int) -> None:
    """Each question, in every form and under every system prompt, is on one side of the split."""
    forms = [text.replace("3", f"3{number}").replace("\uff13", f"\uff13{number}") for text in VARIANTS]
    problems = [
        Problem(environment, (*before, {"role": "user", "content": form}), answer)
        for form in forms
        for environment, answer in (("a", "7"), ("b", ""))
        for before in (
            (),
            ({"role": "system", "content": "Be brief."},),
            ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}),
        )
    ]
    assert len({problem.question() for problem in problems}) == 1
    assert len({is_held_out(problem) for problem in problems}) == 1


def test_accents_are_the_same_composed_and_not() -> None:
    forms = ("caf\u00e9", "cafe\u0301", "cafe\u200d\u0301")  # the last with a joiner, which keeps them apart
    one, *others = (Problem("a", ({"role": "user", "content": text},), "") for text in forms)
    assert all(one.question() == other.question() and one.text() != other.text() for other in others)


def test_different_questions_stay_different() -> None:
    texts = ["a b", "ab", "a b c", "A b", "a b?"]
    assert len({Problem("e", ({"role": "user", "content": text},), "").question() for text in texts}) == len(texts)


def test_held_out_problems_differ_in_what_they_ask() -> None:
    class Spaced(Sums):
        """Writes each sum with one to three blanks."""

        def problem(self, rng: random.Random) -> Problem:
            problem = super().problem(rng)
            content = problem.messages[0]["content"].replace(" ", " " * rng.randint(1, 3))
            return Problem(self.name, ({"role": "user", "content": content},), problem.answer)

    held_out = [(a, b) for a in range(6) for b in range(6) if by_hand_held_out("sums", a, b)]
    drawn = [problem.question() for problem, _ in draw([Spaced(limit=6)], ["low"], len(held_out), 0, held_out=True)]
    assert sorted(drawn) == sorted(f"sums\n{a}+{b}" for a, b in held_out)
    with pytest.raises(ValueError, match="by its last user turn"):
        draw([Spaced(limit=6)], ["low"], len(held_out) + 1, 0, held_out=True)


def test_the_tiny_world_has_the_split_that_its_parent_was_trained_on() -> None:
    rng = random.Random(0)
    for family in (Chains(), Sorting(), Counting()):
        for _ in range(200):
            problem = family.problem(rng)
            assert problem.question() == problem.messages[0]["content"]
