"""Long-context tasks with exactly verifiable answers: retrieval, following a chain, counting over the whole text.

    Retrieval      the numbers noted on one or several keys, among notes on other keys
    VariableChain  the value of a variable that takes it from another, which takes it from another ...
    RecordCount    the number of crates, spread over the whole text, that hold one good
    FrequentWord   the most frequent word of the whole text; in each quarter of it another word is more frequent

Each is an environment (`problem` gives a text of `num_lines` lines, `verify` checks the completion's final text) and a
`TextTask`, whose length `lit_puzzle.evaluate.long_context.LongContextAccuracy` sets to a number of tokens. Keys or
sentences around the answer and thousands commas do not matter; a missing, additional or different number or word is
wrong.

Reads and writes nothing. Source: this project's own; the kinds of problems follow arXiv 2404.06654 (RULER).
"""

import random
import re

from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.long_context_text import NOUNS, Draft, Names, TextTask, filler, problem_of, spread

NOTES = "Read these notes. A question about them follows at the end."
GOODS = ("saffron", "cotton", "copper", "ginger", "marble", "paper", "pepper", "rubber", "sugar", "velvet", "walnuts")
SECTIONS = 4  # parts of a FrequentWord text, each with a word that is the most frequent there and not in all
ROW_OTHERS = 5  # words of a row that are neither the answer nor the section's
RARE_WORDS = 25  # they take turns, so that each occurs about a fifth as often as the answer

_CODE = re.compile(r"(?<!\d)\d{6}(?!\d)")
_WHOLE = re.compile(r"(?<![\w.-])\d+(?![\w-]|\.\d)")
MOST_DIGITS = 20  # of a number of crates; int() refuses 4,300 digits
_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class Retrieval:
    """Notes on keys; the answer is the numbers that the notes on some of the keys say.

    Args:
        name: under which problems and metrics appear.
        num_keys: keys in the question; the answer gives their numbers in this order.
        num_values: notes on each of them, at several depths; the numbers of one key are accepted in any order.
        num_lines: other lines of a problem that `problem` draws.
        record_share: share of them that are notes on other keys; the rest is prose.
    """

    def __init__(
        self,
        name: str = "retrieval",
        num_keys: int = 1,
        num_values: int = 1,
        num_lines: int = 40,
        record_share: float = 0.5,
    ) -> None:
        self.name = name
        self.num_keys = _at_least(name, "num_keys", num_keys, 1)
        self.num_values = _at_least(name, "num_values", num_values, 1)
        self.num_lines = num_lines
        self.record_share = _share(name, record_share)

    def problem(self, rng: random.Random) -> Problem:
        """Draw a problem of `num_lines` lines."""
        return problem_of(self, self.draft(rng), self.num_lines)

    def draft(self, rng: random.Random) -> Draft:
        """Draw the keys and their codes; the text has the notes in any order."""
        names = Names(rng)
        codes = {names.key(): [names.code() for _ in range(self.num_values)] for _ in range(self.num_keys)}
        notes = [_note(key, code) for key in codes for code in codes[key]]
        answer = ", ".join(code for key in codes for code in codes[key])
        numbers = "number does the note" if len(notes) == 1 else f"{len(notes)} numbers do the notes"
        order = ", key by key in this order" if self.num_keys > 1 else ""
        alone = "number" if len(notes) == 1 else "numbers"
        question = f"Which {numbers} on {', '.join(codes)} say? Answer with the {alone} alone{order}."
        return _draft(rng, rng.sample(notes, len(notes)), question, answer, names)

    def lines(self, draft: Draft, count: int) -> list[str]:
        """Return the notes among notes on other keys and prose."""
        return spread(draft.needles, filler(draft, count, self.record_share, _other_note), draft.offset)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if the final text names exactly these numbers, key by key; repetitions do not matter."""
        found, right = list(dict.fromkeys(_codes(final))), _CODE.findall(problem_answer)
        return float(self._by_key(found) == self._by_key(right))

    def _by_key(self, codes: list[str]) -> list[set[str]]:
        return [set(codes[start : start + self.num_values]) for start in range(0, len(codes), self.num_values)]


class VariableChain:
    """Variables that take their values from one another; the answer is the value of the last one.

    Args:
        name: under which problems and metrics appear.
        hops: links from the variable in the question to the one that has a number.
        num_lines: other lines of a problem that `problem` draws.
        record_share: share of them that belong to other chains of the same length; the rest is prose.
    """

    def __init__(
        self, name: str = "variable_chain", hops: int = 4, num_lines: int = 40, record_share: float = 0.5
    ) -> None:
        self.name = name
        self.hops = _at_least(name, "hops", hops, 1)
        self.num_lines = num_lines
        self.record_share = _share(name, record_share)

    def problem(self, rng: random.Random) -> Problem:
        """Draw a problem of `num_lines` lines."""
        return problem_of(self, self.draft(rng), self.num_lines)

    def draft(self, rng: random.Random) -> Draft:
        """Draw a chain; its links stand in any order over the text."""
        names = Names(rng)
        code, keys = names.code(), [names.key() for _ in range(self.hops + 1)]
        needles = [_start(keys[0], code), *map(_link, keys, keys[1:])]
        question = f"What is the value of {keys[-1]}? Answer with the number alone."
        return _draft(rng, rng.sample(needles, len(needles)), question, code, names)

    def lines(self, draft: Draft, count: int) -> list[str]:
        """Return the links among links of other chains, all shuffled, and prose."""
        tail: list[str] = []  # variables of the other chain that is being written

        def other(names: Names) -> str:
            if len(tail) % (self.hops + 1) == 0:
                tail[:] = [names.key()]
                return _start(tail[0], names.code())
            tail.append(names.key())
            return _link(tail[-2], tail[-1])

        others = filler(draft, count, self.record_share, other)
        random.Random(draft.seed).shuffle(others)
        return spread(draft.needles, others, draft.offset)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if the final text names this number of six digits and no other."""
        return float(set(_codes(final)) == {problem_answer})


class RecordCount:
    """Crates that hold goods; the answer is the number of crates that hold one good.

    Args:
        name: under which problems and metrics appear.
        most: largest answer; the smallest is 2.
        num_lines: other lines of a problem that `problem` draws.
        record_share: share of them that are crates with other goods; the rest is prose.
    """

    def __init__(
        self, name: str = "record_count", most: int = 9, num_lines: int = 40, record_share: float = 0.5
    ) -> None:
        self.name = name
        self.most = _at_least(name, "most", most, 2)
        self.num_lines = num_lines
        self.record_share = _share(name, record_share)

    def problem(self, rng: random.Random) -> Problem:
        """Draw a problem of `num_lines` lines."""
        return problem_of(self, self.draft(rng), self.num_lines)

    def draft(self, rng: random.Random) -> Draft:
        """Draw a good and the crates that hold it."""
        names = Names(rng)
        good, crates = rng.choice(GOODS), rng.randint(2, self.most)
        needles = [_crate(names.key(), good) for _ in range(crates)]
        names.used.add(good)
        question = f"How many crates hold {good}? Answer with the number alone, in digits."
        return _draft(rng, needles, question, str(crates), names)

    def lines(self, draft: Draft, count: int) -> list[str]:
        """Return the crates among crates with other goods and prose."""
        goods = [good for good in GOODS if good not in draft.reserved]
        others = filler(draft, count, self.record_share, lambda names: _crate(names.key(), names.rng.choice(goods)))
        return spread(draft.needles, others, draft.offset)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if the final text names this number and no other; digits inside keys do not count."""
        named = {
            int(digits) if len(digits) < MOST_DIGITS else digits for digits in _WHOLE.findall(_COMMA.sub("", final))
        }
        return float(named == {int(problem_answer)})


class FrequentWord:
    """Rows of words; the answer is the most frequent word of the whole text.

    Each row has the answer once and the word of its section (a quarter of the text) twice, so that in less than about
    half of the text another word is more frequent.

    Args:
        name: under which problems and metrics appear.
        num_lines: rows of a problem that `problem` draws, beyond the first 3.
    """

    def __init__(self, name: str = "frequent_word", num_lines: int = 40) -> None:
        self.name = name
        self.num_lines = num_lines

    def problem(self, rng: random.Random) -> Problem:
        """Draw a problem of `num_lines` + 3 rows."""
        return problem_of(self, self.draft(rng), self.num_lines)

    def draft(self, rng: random.Random) -> Draft:
        """Draw the answer; the rows follow from the seed."""
        answer = rng.choice(NOUNS)
        question = "Which word is the most frequent in all rows together? Answer with the word alone."
        introduction = "Read these rows of words. A question about them follows at the end."
        return Draft(introduction, (), question, answer, frozenset({answer}), rng.getrandbits(64), rng.random())

    def lines(self, draft: Draft, count: int) -> list[str]:
        """Return `count` + 3 rows (with fewer than 3 the word of a section could be as frequent as the answer)."""
        rng = random.Random(draft.seed)
        others = rng.sample([noun for noun in NOUNS if noun not in draft.reserved], SECTIONS + RARE_WORDS)
        sections, rare = others[:SECTIONS], others[SECTIONS:]
        rows, total = [], count + 3
        for index in range(total):
            local = sections[index * SECTIONS // total]
            turn = [rare[(index * ROW_OTHERS + place) % RARE_WORDS] for place in range(ROW_OTHERS)]
            words = [draft.answer, local, local, *turn]
            rows.append(" ".join(rng.sample(words, len(words))))
        return rows

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if the final text names this word of the list and no other, in any case."""
        named = set(re.findall(r"[a-z]+", final.lower())) & set(NOUNS)
        return float(named == {problem_answer})


def _draft(rng: random.Random, needles: list[str], question: str, answer: str, names: Names) -> Draft:
    return Draft(NOTES, tuple(needles), question, answer, frozenset(names.used), rng.getrandbits(64), rng.random())


def _note(key: str, code: str) -> str:
    return f"The note on {key} says {code}."


def _other_note(names: Names) -> str:
    return _note(names.key(), names.code())


def _start(key: str, code: str) -> str:
    return f"The value of {key} is {code}."


def _link(before: str, key: str) -> str:
    return f"The value of {key} is that of {before}."


def _crate(key: str, good: str) -> str:
    return f"Crate {key} holds {good}."


def _codes(final: str) -> list[str]:
    """Return the numbers of six digits in the final text."""
    return _CODE.findall(_COMMA.sub("", final))


def _share(name: str, share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: record_share must be from 0 to 1, got {share!r}.")
    return share


def _at_least(name: str, argument: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f"{name}: {argument} must be at least {least}, got {value!r}.")
    return value


def default_tasks() -> list[TextTask]:
    """Return one task of each kind: a key, several values of a key, several keys, a chain, a count, a word."""
    return [
        Retrieval("retrieval_key"),
        Retrieval("retrieval_values", num_values=4),
        Retrieval("retrieval_keys", num_keys=4),
        VariableChain(),
        RecordCount(),
        FrequentWord(),
    ]
