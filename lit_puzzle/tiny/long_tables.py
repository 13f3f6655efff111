"""Problems of the tiny world in a prompt of many tokens: a table among definitions of letters that nobody asks about.

    chains b=4 r=7 t=0 k=b+2 t=5 r=3 ... q=k+1 r=9 ...
    value:q?

The 16 definitions of the table, in their order, are spread evenly over the text. Between them the four letters that the
table leaves out get values, again and again. Question, answer and worked solution are those of the short problem, so a
family stays what it is: `chains` is retrieval (no link) and chains of variables (1 to 4 links), `sorting` the retrieval
of several keys, `counting` counts over the whole text.

Reads and writes nothing. Source: this project's own, after `lit_puzzle.environments.long_context_tasks`.
"""

import random
from functools import cache

from transformers import PreTrainedTokenizerBase

from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.long_context_text import Draft, fit, spread
from lit_puzzle.evaluate.long_context import Length
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import LETTERS, Family, define, parse


class LongTable:
    """A family of the tiny world with prompts of `context_tokens`, or one token less: a definition has two.

    Args:
        family: which problems.
        context_tokens: tokens of the whole prompt.

    Raises:
        ValueError: `context_tokens` below 1; a table of its own length does not fit when a problem is drawn.
    """

    def __init__(self, family: Family, context_tokens: int) -> None:
        if context_tokens < 1:
            raise ValueError(f"{family.name}: context_tokens {context_tokens} was given; 1 or more is needed.")
        self.family = family
        self.context_tokens = context_tokens
        self.name = f"{family.name}_{context_tokens}"

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem with its own table."""
        return self.lengthened(self.family.problem(rng), rng)

    def lengthened(self, problem: Problem, rng: random.Random) -> Problem:
        """Return a problem of the family with a prompt of `context_tokens`, its definitions among others."""
        return fit(self, self._draft(problem, rng), Length(_tokenizer(), ["high"]), self.context_tokens)

    def draft(self, rng: random.Random) -> Draft:
        """Draw a problem of the family; its definitions are the needles."""
        return self._draft(self.family.problem(rng), rng)

    def _draft(self, problem: Problem, rng: random.Random) -> Draft:
        table, _, _ = parse(problem)
        needles = tuple(define(table, letter) for letter in table)
        question = "\n" + problem.messages[-1]["content"].partition("\n")[2]
        others = (rng.getrandbits(64), rng.random())
        return Draft(self.family.name, needles, question, problem.answer, frozenset(table), *others, "", "", ())

    def lines(self, draft: Draft, count: int) -> list[str]:
        """Return the table's definitions among `count` of the other letters."""
        rng, letters = random.Random(draft.seed), [letter for letter in LETTERS if letter not in draft.reserved]
        others = [f" {rng.choice(letters)}={rng.randrange(10)}" for _ in range(count)]
        return spread(draft.needles, others, draft.offset)

    def trace(self, problem: Problem, effort: str) -> str:
        """Return the worked solution at an effort."""
        return self.family.trace(problem, effort)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if the final channel is exactly the answer, otherwise 0.0."""
        return self.family.verify(final, problem_answer)


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()
