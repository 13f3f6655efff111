r"""Problems of reasoning-gym: a hundred generators of puzzles, each of which verifies its answers itself.

A problem is row `index` of the endless data set that a generator makes of `seed` and its own settings; `answer` of a
`Problem` is JSON with that index and the generator's answer, from which the row is made again for scoring. The right
answer scores 1; what a generator gives for others, it decides (a longer text around the answer, say, a share).

    extract   what of a final text is scored
    text      all of it
    number    the last number in it, integers without separators
    tag       what stands between the last <answer> and </answer>; a sentence asks for that

Nine generators compute what the model writes as Python code in order to score it. They are refused.

Needs the package `reasoning-gym`. Reads and writes nothing.
"""

import difflib
import json
import random
import re
from fractions import Fraction
from typing import Any, Literal

from lit_puzzle.environments.environment import Problem

Extract = Literal["text", "number", "tag"]
ROWS = 1_000_000  # problems of a generator
MAX_CHARACTERS = 20_000  # of an answer that is scored; no generator has longer ones
NUMBER = re.compile(r"[+-]?(?:\d++(?:,\d{3})*+(?:\.\d++)?|\.\d++)")
MAX_DIGITS = 1000  # of a number
TAG_REQUEST = "Write your final answer between <answer> and </answer>."
EVALUATING = (  # their scoring calls eval() or sympy's parser, which calls it, on the answer
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)


class ReasoningGym:
    """Problems of one generator of reasoning-gym.

    Args:
        generator: its name, such as `chain_sum`.
        name: under which problems, metrics and rewards appear; None: the generator's.
        seed: of the generator; another seed gives other problems.
        settings: of the generator, such as `{max_terms: 3}`.
        extract: what of a final text is scored.
        partial: whether an answer that the generator finds partly right counts as that share; else as 0.
        request: a sentence behind each question; None: none, or the request for tags.

    Raises:
        ValueError: reasoning-gym is not installed, it has no such generator or setting, or one that is refused.
    """

    def __init__(
        self,
        generator: str,
        name: str | None = None,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        extract: Extract = "text",
        partial: bool = True,
        request: str | None = None,
    ) -> None:
        self.name = name or generator
        self.extract, self.partial = extract, partial
        self.request = TAG_REQUEST if request is None and extract == "tag" else request
        self._rows = _data_set(generator, seed, settings or {})

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem."""
        index = rng.randrange(ROWS)
        row = self._rows[index]
        content = row["question"] if self.request is None else f"{row['question'].rstrip()}\n{self.request}"
        answer = json.dumps({"answer": row["answer"], "index": index})
        return Problem(self.name, ({"role": "user", "content": content},), answer)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return the generator's score of a final text, from 0 to 1."""
        answer = _extracted(final, self.extract)
        if answer is None or len(answer) > MAX_CHARACTERS:
            return 0.0
        score = float(self._rows.score_answer(answer, self._rows[json.loads(problem_answer)["index"]]))
        return min(max(score, 0.0), 1.0) if self.partial else float(score >= 1)


def _extracted(final: str, extract: Extract) -> str | None:
    if extract == "text":
        return final.strip()
    if extract == "number":
        numbers = NUMBER.findall(final[-MAX_CHARACTERS:])
        if not numbers or len(numbers[-1]) > MAX_DIGITS:
            return None
        number = Fraction(numbers[-1].replace(",", ""))
        return str(number.numerator) if number.denominator == 1 else repr(float(number))
    found = re.findall(r"<answer>([^<]*+)</answer>", final)
    return found[-1].strip() if found else None


def _data_set(generator: str, seed: int, settings: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            "The environment ReasoningGym needs reasoning-gym: pip install 'lit-puzzle[reasoning-gym]'."
        ) from error
    known = sorted(set(DATASETS) - {"composite", *EVALUATING})
    if generator in EVALUATING:
        raise ValueError(
            f"reasoning-gym's {generator} scores an answer by running it as Python code, which a model could abuse. "
            "Take another generator."
        )
    if generator not in known:
        near = difflib.get_close_matches(generator, known, n=3, cutoff=0.4)
        raise ValueError(
            f"reasoning-gym has no generator {generator!r}; {len(known)} are known"
            f"{', the nearest are ' + ', '.join(near) if near else ''}."
        )
    try:
        return reasoning_gym.create_dataset(generator, size=ROWS, seed=seed, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's {generator} does not take the settings {settings}: {error}") from error
