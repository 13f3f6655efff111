"""Long texts with a few lines that matter: words, records and prose of our own, laid out to an exact number of tokens.

A problem is an introduction, many lines (a note each), a closing line and a question. The lines that the answer rests
on are spread evenly over the depth of the text; between them lie records of the same form about other things, and
prose. Everything is drawn from a seed. How many lines there are decides the length alone: `fit` finds the most that a
context holds, for any tokenizer and chat template, and fills up what is left with single words.

Reads and writes nothing. Memory: about 6 bytes a token for the text + 8 bytes a token for its ids, one problem at a
time. Source: this project's own; the kinds of problems follow arXiv 2404.06654 (RULER).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lit_puzzle.environments.environment import Environment, Problem

_ADJECTIVES = (
    "amber bold brisk calm clever coral crimson dusty eager early faint gentle golden grand hollow honest icy jolly "
    "keen late lively lucky mellow mild misty noble pale patient plain proud quiet rapid rough silver sleepy solid "
    "sturdy tidy violet wise"
)
_NOUNS = (
    "anchor anvil badger barrel beacon bridge candle canyon cedar comet compass falcon ferry garden glacier hammer "
    "harbor heron island ladder lantern ledger magnet meadow mirror needle orchard otter pebble pillar prairie quarry "
    "raven ribbon saddle sparrow thistle timber tunnel willow"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
WHO = ("The baker", "A teacher", "The old captain", "Her neighbor", "The night guard", "A young clerk", "The weaver")
DOES = ("waits for", "looks after", "talks about", "walks around", "paints", "remembers", "sweeps", "draws")
WHAT = ("the market square", "the empty house", "a wooden fence", "the long road", "the river bank", "a small boat")
WHEN = ("before sunrise", "after supper", "every other week", "when it rains", "in the spring", "without a word")

CLOSING = "The notes end here"
FILLER_WORDS = (" on", " and", " so", "!", ".")  # a tokenizer has one of them as a single token, whatever stands around
MOST_LINES = 400_000  # keys and codes are drawn without repetition from about a million


@dataclass(frozen=True)
class Draft:
    """A problem whose length is still open.

    Attributes:
        introduction: First line of the text.
        needles: The lines that the answer rests on, in the order in which they appear.
        question: Last line of the text.
        answer: What `verify` compares with.
        reserved: Keys and codes of the needles: no other line mentions them.
        seed: Of all other lines.
        offset: Where in its equal share of the text every needle lies, 0 <= offset < 1.
    """

    introduction: str
    needles: tuple[str, ...]
    question: str
    answer: str
    reserved: frozenset[str]
    seed: int
    offset: float


class TextTask(Environment, Protocol):
    """An environment of long texts: as many lines as asked for around the same needles."""

    def draft(self, rng: random.Random) -> Draft:
        """Draws all of a problem but its length."""
        ...

    def lines(self, draft: Draft, count: int) -> list[str]:
        """The text's lines, needles and `count` others; equal arguments give equal lines."""
        ...


class Names:
    """Draws keys and codes, none twice.

    Args:
        rng: What they are drawn from.
        used: Keys and codes that must not be drawn.
    """

    def __init__(self, rng: random.Random, used: frozenset[str] = frozenset()) -> None:
        self.rng = rng
        self.used = set(used)

    def key(self) -> str:
        """A new name such as ``amber-falcon-172``."""
        choose = self.rng.choice
        return self._new(lambda: f"{choose(ADJECTIVES)}-{choose(NOUNS)}-{self.rng.randrange(100, 1000)}")

    def code(self) -> str:
        """A new number of six digits."""
        return self._new(lambda: str(self.rng.randrange(100_000, 1_000_000)))

    def _new(self, draw: Callable[[], str]) -> str:
        while True:
            text = draw()
            if text not in self.used:
                self.used.add(text)
                return text


def prose(rng: random.Random) -> str:
    """A sentence without keys, codes or goods."""
    return f"{rng.choice(WHO)} {rng.choice(DOES)} {rng.choice(WHAT)} {rng.choice(WHEN)}."


def filler(draft: Draft, count: int, share: float, record: Callable[[Names], str]) -> list[str]:
    """`count` lines that are no needles: about `share` of them records of other things, the rest prose."""
    rng = random.Random(draft.seed)
    names = Names(rng, draft.reserved)
    return [record(names) if rng.random() < share else prose(rng) for _ in range(count)]


def spread(needles: Sequence[str], others: Sequence[str], offset: float) -> list[str]:
    """The needles among the other lines: of n needles, number i at depth (i + offset) / n."""
    lines: list[str] = []
    taken = 0
    for index, needle in enumerate(needles):
        depth = round((index + offset) / len(needles) * len(others))
        lines += [*others[taken:depth], needle]
        taken = depth
    return [*lines, *others[taken:]]


def problem_of(task: TextTask, draft: Draft, count: int, padding: str = "") -> Problem:
    """The problem with `count` lines around its needles, and a closing line that ends in `padding`."""
    if count > MOST_LINES:
        raise ValueError(f"{task.name}: {count} lines were asked for; at most {MOST_LINES} can all be different.")
    text = "\n".join([draft.introduction, *task.lines(draft, count), f"{CLOSING}{padding}", draft.question])
    return Problem(task.name, ({"role": "user", "content": text},), draft.answer)


def fit(task: TextTask, draft: Draft, length: Callable[[Problem], int], context_tokens: int) -> Problem:
    """The problem with as many lines as `context_tokens` hold, filled up by single words.

    Args:
        task: Where the draft is from.
        draft: The problem but for its length.
        length: Tokens of a problem's whole prompt.
        context_tokens: Of the result, exactly; where no filler word is a single token of the tokenizer, less by fewer
            tokens than such a word has. Never more.

    Raises:
        ValueError: The problem without other lines is longer already.
    """
    shortest = length(problem_of(task, draft, 0))
    if shortest > context_tokens:
        raise ValueError(
            f"{task.name}: context_tokens is {context_tokens}, but the needles and the question alone are {shortest} "
            "tokens. Ask for a longer context or for fewer needles."
        )
    count = most(lambda lines: length(problem_of(task, draft, lines)), context_tokens)
    best = problem_of(task, draft, count)
    reached = length(best)
    for word in FILLER_WORDS:
        words = most(lambda n: length(problem_of(task, draft, count, word * n)), context_tokens)  # noqa: B023
        padded = problem_of(task, draft, count, word * words)
        if (tokens := length(padded)) > reached:
            best, reached = padded, tokens
        if reached == context_tokens:
            break
    return best


def most(length: Callable[[int], int], limit: int) -> int:
    """The largest n with length(n) <= limit, for a length that grows about evenly; length(0) must be within it.

    Interpolates, so that a long text is laid out and counted a few times, not once for every bit of n.
    """
    low, low_length = 0, length(0)
    high, high_length = 1, length(1)
    while high_length <= limit:
        slope = max((high_length - low_length) / (high - low), 1.0)
        low, low_length = high, high_length
        high = min(low + int((limit - low_length) / slope) + 1, MOST_LINES)
        high_length = length(high)
        if low == high:
            return low
    while high - low > 1:
        slope = (high_length - low_length) / (high - low)
        guess = low + int((limit - low_length) / slope) if slope > 0 else low
        middle = min(max(guess, low + 1), high - 1)
        tokens = length(middle)
        if tokens <= limit:
            low, low_length = middle, tokens
        else:
            high, high_length = middle, tokens
    return low
