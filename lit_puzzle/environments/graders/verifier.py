"""Verifies final texts by a named kind of verification; environments of rows hold one.

    exact           equal text                              numeric         equal numbers
    choice          equal letter, or set of letters         math            equal mathematics
    instructions    every instruction followed              schema          JSON that a schema allows
    code            every unit test passed

Gold answers are texts. The unit tests of `code` stay here and are known by a hash, for they can be megabytes.

Reads and writes nothing. Needs no torch.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from lit_puzzle.environments.graders.choice_answers import LETTERS, SEVERAL, stated_choice, stated_choices
from lit_puzzle.environments.graders.code_tests import UnitTests, grade_programs, read_tests
from lit_puzzle.environments.graders.exact_answers import same_text
from lit_puzzle.environments.graders.instructions import grade_instructions, read_instructions
from lit_puzzle.environments.graders.math_answers import grade_math, read_math
from lit_puzzle.environments.graders.number_answers import read_number, same_number, stated_number
from lit_puzzle.environments.graders.schema_answers import grade_schemas, read_schema
from lit_puzzle.environments.sandbox import check_sandbox
from lit_puzzle.environments.sandbox_limits import SandboxLimits
from lit_puzzle.environments.verdict import UNCLEAR, Verdict, verdict_of

Verification = Literal["exact", "numeric", "choice", "math", "instructions", "schema", "code"]


class Verifier:
    """Reads gold answers and verifies final texts.

    Args:
        verification: which kind.
        limits: of programs; only for `code`.

    Raises:
        ValueError: an unknown kind, or `code` on a machine without a sandbox.
    """

    def __init__(self, verification: Verification, limits: SandboxLimits | None = None) -> None:
        if verification not in get_args(Verification):
            raise ValueError(
                f"verification {verification!r} is not known; known are {', '.join(get_args(Verification))}."
            )
        self.verification = verification
        self.limits = limits or SandboxLimits()
        self._tests: dict[str, UnitTests] = {}
        if verification == "code":
            check_sandbox()

    def gold(self, value: Any, place: str) -> str:
        """Return a gold answer as text.

        Args:
            value: the answer of a row: text or number; an object for `instructions`, `schema` and `code`, and for
                `choice` if it has the texts of the options: `{"letter": text, "options": {letter: text}}`. Several
                letters (`AB`, `A, B`) or a list of them: all have to be chosen, in any order.
            place: where it stands, for messages.

        Raises:
            ValueError: this verification cannot read it.
        """
        match self.verification:
            case "instructions":
                return read_instructions(value, place)
            case "schema":
                return read_schema(value, place)
            case "code":
                tests = value if isinstance(value, UnitTests) else read_tests(value, place)
                self._tests[tests.key()] = tests
                return tests.key()
        if self.verification == "choice" and isinstance(value, Mapping | list):
            return _gold_choice(value, place)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{place}: answer {value!r} must be a text or a number.")
        text = str(value).strip()
        if self.verification == "math":
            return read_math(text, place)
        readable = {"exact": bool(text), "numeric": read_number(text) is not None}
        if self.verification == "choice" and len(text) > 1 and (several := _letters(text)):
            return "".join(several)
        if not readable.get(self.verification, len(text) == 1 and text in LETTERS):
            hint = " Use verification: math." if self.verification == "numeric" else ""
            raise ValueError(f"{place}: {self.verification} verification cannot read the answer {text[:80]!r}.{hint}")
        return text

    def verdicts(self, finals: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each final text."""
        match self.verification:
            case "math":
                return grade_math(finals, golds)
            case "schema":
                return grade_schemas(finals, golds)
            case "code":
                return grade_programs(finals, [self._tests[gold] for gold in golds], self.limits)
        return [self._verdict(final, gold) for final, gold in zip(finals, golds, strict=True)]

    def _verdict(self, final: str, gold: str) -> Verdict:
        if self.verification == "instructions":
            return grade_instructions(final, gold)
        if self.verification == "exact":
            return verdict_of(same_text(final, gold))
        if self.verification == "numeric":
            number = stated_number(final)
            return Verdict(0.0, UNCLEAR) if number is None else verdict_of(same_number(number, read_number(gold)))
        right, options = json.loads(gold) if gold.startswith("[") else (gold, None)
        letters = "".join(options) if options else LETTERS
        if len(right) > 1:
            choices = stated_choices(final, letters)
            return Verdict(0.0, UNCLEAR) if choices is None else verdict_of(choices == set(right))
        chosen = stated_choice(final, letters, options)
        return Verdict(0.0, UNCLEAR) if chosen is None else verdict_of(chosen == right)


def _gold_choice(value: Mapping[str, Any] | list[Any], place: str) -> str:
    if isinstance(value, list):
        if not (letters := _letters(",".join(map(str, value)))):
            raise ValueError(f"{place}: choice verification cannot read the answer {str(value)[:80]!r}.")
        return "".join(letters)
    letter, options = value.get("letter"), value.get("options")
    named: list[Any] = letter if isinstance(letter, list) else [letter]
    if not isinstance(options, Mapping) or not named or not all(name in options for name in named):
        raise ValueError(f"{place}: the answer {letter!r} is none of the options {sorted(options or [])}.")
    wrong = [key for key in options if not (len(str(key)) == 1 and "A" <= str(key) <= "Z")]
    if wrong:
        raise ValueError(f"{place}: an option is called {wrong[0]!r}; options are single letters A-Z.")
    return json.dumps(["".join(sorted(set(named))), dict(options)], ensure_ascii=False)


def _letters(text: str) -> list[str]:
    """Return the letters of an answer that names some (`AB`, `B, A`), sorted; none if it is anything else."""
    letters = SEVERAL.sub("", text)
    return sorted(letters) if set(letters) <= set(LETTERS) and len(set(letters)) == len(letters) else []
