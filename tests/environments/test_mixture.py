"""mixture.py and environment.Mixture: whose turn it is."""

import random
from collections import Counter

import pytest

from lit_puzzle.environments.environment import Environment, Mixture, Problem, draw
from lit_puzzle.environments.mixture import turns


class Numbers:
    """Questions about numbers, of a name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def problem(self, rng: random.Random) -> Problem:
        return Problem(self.name, ({"role": "user", "content": f"{self.name} {rng.randrange(10**9)}"},), "1")

    def verify(self, final: str, problem_answer: str) -> float:
        return float(final == problem_answer)


def test_equal_weights_take_turns() -> None:
    assert turns([1.0, 1.0, 1.0], 7) == [0, 1, 2, 0, 1, 2, 0] == turns([0.1, 0.1, 0.1], 7)


def test_every_prefix_is_as_close_to_the_weights_as_it_can_be() -> None:
    weights = [5.0, 2.0, 1.0, 0.5]
    order = turns(weights, 850)
    for length in (1, 10, 85, 850):
        counts = Counter(order[:length])
        assert all(abs(counts[number] - weight / 8.5 * length) <= 1.5 for number, weight in enumerate(weights))
    assert [Counter(order)[number] for number in range(4)] == [500, 200, 100, 50]


def test_a_mixture_is_drawn_by_its_weights() -> None:
    environments: list[Environment] = [Numbers("a"), Numbers("b")]
    mixture = Mixture(environments, {"a": 3.0, "b": 1.0})
    drawn = [problem.environment for problem, _ in draw(mixture, ["low"], 40, 0, held_out=False)]
    assert Counter(drawn) == {"a": 30, "b": 10} and len(mixture) == 2 and list(mixture) == environments
    assert draw(environments, ["low"], 40, 0, held_out=False) == draw(
        Mixture(environments, {"a": 2.0, "b": 2.0}), ["low"], 40, 0, held_out=False
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, r"\['b'\] have no weight"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"\['c'\] are none of them"),
        ({"a": 1.0, "b": 0.0}, "b has 0.0"),
        ({"a": 1.0, "b": float("nan")}, "b has nan"),
    ],
)
def test_wrong_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture([Numbers("a"), Numbers("b")], weights)
