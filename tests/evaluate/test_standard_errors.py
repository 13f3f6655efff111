"""Standard errors with several samples a prompt, against a simulation, a worked case and the formula for one sample."""

import math
import random
import statistics

import pytest

from lit_puzzle.evaluate.standard_errors import mean_and_error


def test_one_sample_a_prompt_is_the_usual_formula():
    values = [0.0, 1.0, 1.0, 0.5, 3.0]
    mean, error = mean_and_error(values)
    assert mean == 1.1 and error == pytest.approx(statistics.stdev(values) / math.sqrt(5), rel=1e-12)
    assert mean_and_error(values, ["a", "b", "c", "d", "e"]) == (mean, error)


def test_a_case_worked_by_hand():
    """Prompts a: 1, 1 and b: 0, 1; mean 3/4; sums of deviations 1/2 and -1/2; sqrt(2 / 1 * 1/2) / 4 = 1/4."""
    assert mean_and_error([1.0, 1.0, 0.0, 1.0], ["a", "a", "b", "b"]) == (0.75, 0.25)


def test_equal_samples_add_nothing():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    repeated = [value for value in values for _ in range(8)]
    prompts = [prompt for prompt in range(5) for _ in range(8)]
    assert mean_and_error(repeated, prompts) == pytest.approx(mean_and_error(values))


def test_the_error_is_the_spread_of_repeated_evaluations():
    rng = random.Random(0)

    def evaluation() -> tuple[float, float]:
        values, prompts = [], []
        for prompt in range(60):
            right = rng.random()  # how easy the prompt is
            values += [float(rng.random() < right) for _ in range(4)]
            prompts += [prompt] * 4
        return mean_and_error(values, prompts)

    runs = [evaluation() for _ in range(800)]
    spread = statistics.stdev(mean for mean, _ in runs)
    assert statistics.mean(error for _, error in runs) == pytest.approx(spread, rel=0.07)


def test_two_prompts_are_needed():
    with pytest.raises(ValueError, match=r"3 completions of 1 prompts at one effort"):
        mean_and_error([1.0, 0.0, 1.0], ["a", "a", "a"])
