"""Long texts with a few lines that matter, written to an exact number of tokens, of words and sentences of our own.

A problem is an introduction, many lines (one note each), a closing line and a question. The lines that the answer
depends on, the needles, are spread evenly over the text; between them are records of the same form about other things,
and prose. Everything is drawn from a seed. The number of lines determines the length: `fit` finds the largest number
that a context holds, for any tokenizer and chat template, and fills the remaining tokens with single words.

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
FILLER_WORDS = (" on", " and", " so", "!", ".")  # a tokenizer has one of them as a single token in any context
MOST_LINES = 400_000  # keys and codes are drawn without repetition from about a million


@dataclass(frozen=True)
class Draft:
    """A problem without its length.

    Attributes:
        introduction: first line of the text.
        needles: the lines that the answer depends on, in the order in which they appear.
        question: last line of the text.
        answer: what `verify` compares with.
        reserved: keys and codes of the needles: no other line mentions them.
        seed: of all other lines.
        offset: position of every needle in its equal share of the text, 0 <= offset < 1.
        joint: what stands between introduction, lines, closing line and question.
        closing: the line before the question.
        fillers: words that follow it until the length is reached; none: the text may be a few tokens shorter.
    """

    introduction: str
    needles: tuple[str, ...]
    question: str
    answer: str
    reserved: frozenset[str]
    seed: int
    offset: float
    joint: str = "\n"
    closing: str = CLOSING
    fillers: tuple[str, ...] = FILLER_WORDS


class TextTask(Environment, Protocol):
    """An environment of long texts: any number of lines around the same needles."""

    def draft(self, rng: random.Random) -> Draft:
        """Draw all of a problem but its length."""
        ...

    def lines(self, draft: Draft, count: int) -> list[str]:
        """Return the lines of the text, needles and `count` others; equal arguments give equal lines."""
        ...


class Names:
    """Draws keys and codes without repetition.

    Args:
        rng: what they are drawn from.
        used: keys and codes that must not be drawn.
    """

    def __init__(self, rng: random.Random, used: frozenset[str] = frozenset()) -> None:
        self.rng = rng
        self.used = set(used)

    def key(self) -> str:
        """Draw a new name such as ``amber-falcon-172``."""
        choose = self.rng.choice
        return self._new(lambda: f"{choose(ADJECTIVES)}-{choose(NOUNS)}-{self.rng.randrange(100, 1000)}")

    def code(self) -> str:
        """Draw a new number of six digits."""
        return self._new(lambda: str(self.rng.randrange(100_000, 1_000_000)))

    def _new(self, draw: Callable[[], str]) -> str:
        while True:
            text = draw()
            if text not in self.used:
                self.used.add(text)
                return text


def prose(rng: random.Random) -> str:
    """Draw a sentence without keys, codes or goods."""
    return f"{rng.choice(WHO)} {rng.choice(DOES)} {rng.choice(WHAT)} {rng.choice(WHEN)}."


def filler(draft: Draft, count: int, share: float, record: Callable[[Names], str]) -> list[str]:
    """Return `count` lines that are no needles: about `share` of them records of other things, the rest prose."""
    rng = random.Random(draft.seed)
    names = Names(rng, draft.reserved)
    return [record(names) if rng.random() < share else prose(rng) for _ in range(count)]


def spread(needles: Sequence[str], others: Sequence[str], offset: float) -> list[str]:
    """Return the needles among the other lines: of n needles, number i at depth (i + offset) / n."""
    lines: list[str] = []
    taken = 0
    for index, needle in enumerate(needles):
        depth = round((index + offset) / len(needles) * len(others))
        lines += [*others[taken:depth], needle]
        taken = depth
    return [*lines, *others[taken:]]


def problem_of(task: TextTask, draft: Draft, count: int, padding: str = "") -> Problem:
    """Return the problem with `count` lines around its needles, and a closing line that ends in `padding`."""
    if count > MOST_LINES:
        raise ValueError(f"{task.name}: {count} lines are needed; at most {MOST_LINES} can all be different.")
    closing = f"{draft.closing}{padding}"
    text = draft.joint.join([draft.introduction, *task.lines(draft, count), closing, draft.question])
    return Problem(task.name, ({"role": "user", "content": text},), draft.answer)


def fit(task: TextTask, draft: Draft, length: Callable[[Problem], int], context_tokens: int) -> Problem:
    """Return the problem with as many lines as `context_tokens` hold, padded with single words.

    Args:
        task: which drew the draft.
        draft: the problem without its length.
        length: number of tokens of a problem's whole prompt.
        context_tokens: length of the result, reached exactly where a filler word is a single token of the tokenizer;
            otherwise the result is shorter by fewer tokens than such a word has.

    Raises:
        ValueError: the problem without other lines is too long.
    """
    shortest = length(problem_of(task, draft, 0))
    if shortest > context_tokens:
        raise ValueError(
            f"{task.name}: context_tokens is {context_tokens}, but the needles and the question alone are {shortest} "
            "tokens. Use a longer context or fewer needles."
        )
    count = most(lambda lines: length(problem_of(task, draft, lines)), context_tokens)
    best = problem_of(task, draft, count)
    reached = length(best)
    for word in draft.fillers:
        words = most(lambda n: length(problem_of(task, draft, count, word * n)), context_tokens)  # noqa: B023
        padded = problem_of(task, draft, count, word * words)
        if (tokens := length(padded)) > reached:
            best, reached = padded, tokens
        if reached == context_tokens:
            break
    return best


def most(length: Callable[[int], int], limit: int) -> int:
    """Return the largest n with length(n) <= limit, for a length that grows about evenly and length(0) <= limit.

    Interpolates, so that a long text is written and counted a few times, not once for every bit of n.
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
