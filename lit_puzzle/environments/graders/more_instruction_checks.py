"""Checks of the further instructions that Nemotron's instruction following set takes from IFEvalG (open-instruct).

The form is that of `instruction_checks`. What IFEvalG does where its words say something else (a count of lowercase
words for "each lowercase word at most N times") is done here as there: models were trained and measured by it.

Reads and writes nothing. Time proportional to the text.
"""

import itertools
import re
from collections.abc import Callable

from lit_puzzle.environments.graders.instruction_checks import (
    BLANK_LINE,
    RELATIONS,
    keyword_frequency,
    letter_frequency,
    occurrences,
)
from lit_puzzle.environments.graders.text_units import DIVIDER, paragraphs, sentences, whole_words, words


def keyword_once(text: str, *, keyword: str) -> bool:
    """Return whether a keyword occurs once."""
    return occurrences(text, keyword) == 1


def word_excluded(text: str, *, keyword: str) -> bool:
    """Return whether a word does not occur between blanks."""
    return f" {keyword.strip()} " not in text


def no_adjacent_letters(text: str) -> bool:
    """Return whether no two adjacent words begin with consecutive letters of the alphabet."""
    first = [word[0].lower() for word in text.split()]
    return not any(ord(after) - ord(before) == 1 for before, after in itertools.pairwise(first))


def keyword_at_position(text: str, *, keyword: str, n: int, m: int) -> bool:
    """Return whether a keyword is word m of sentence n, both from 1."""
    found = sentences(text)
    inside = whole_words(found[n - 1]) if 1 <= n <= len(found) else []
    return 1 <= m <= len(inside) and inside[m - 1].lower() == keyword.strip().lower()


def palindrome(text: str) -> bool:
    """Return whether a word is a palindrome."""
    return any(word == word[::-1] for word in text.split())


def same_start_and_end(text: str) -> bool:
    """Return whether a text begins and ends with the same word, and with nothing after it."""
    inside = text.split()
    return bool(inside) and words(inside[0].lower()) == [inside[-1].lower()]


def letter_counting(text: str, *, N: int, relation: str) -> bool:
    """Return whether a text has so many letters."""
    return RELATIONS[relation](len(re.findall(r"[A-Za-z]", text)), N)


def two_paragraphs(text: str, divider: re.Pattern[str]) -> bool:
    """Return whether a text has two paragraphs."""
    return len(paragraphs(text, divider) or []) == 2


def first_word_of_sentences(text: str, *, first_word: str) -> bool:
    """Return whether every sentence begins with a word."""
    return all(part.split()[0].lower() == first_word.strip().lower() for part in sentences(text))


def first_word_of_answer(text: str, *, first_word: str) -> bool:
    """Return whether a text begins with a word."""
    return text.lower().split()[:1] == [first_word.strip().lower()]


def last_word_of_sentences(text: str, *, last_word: str) -> bool:
    """Return whether every sentence ends with a word, punctuation aside."""
    return all(_bare(part.split()[-1]) == last_word.strip().lower() for part in sentences(text))


def last_word_of_answer(text: str, *, last_word: str) -> bool:
    """Return whether a text ends with a word, punctuation aside."""
    return [_bare(word) for word in text.split()[-1:]] == [last_word.strip().lower()]


def _bare(word: str) -> str:
    return re.sub(r"[^\w\s]", "", word).lower()


def bigram_wrapping(text: str) -> bool:
    """Return whether every two words stand in `<<` and `>>`."""
    inside = text.split()
    return all(one.startswith("<<") and two.endswith(">>") for one, two in zip(inside[::2], inside[1::2]))


def square_brackets(text: str) -> bool:
    """Return whether every word stands in square brackets."""
    return all(word.startswith("[") and word.endswith("]") for word in text.split())


def sentence_hyphens(text: str) -> bool:
    """Return whether sentences are joined by hyphens without blanks."""
    parts = text.split("-")
    return all(part == part.strip() == gold for part, gold in zip(parts, sentences(text.replace("-", " "))))


def copied(text: str, *, prompt_to_repeat: str) -> bool:
    """Return whether a text is the request and nothing else."""
    return text.strip().lower() == prompt_to_repeat.strip().lower()


def copied_times(text: str, *, prompt_to_repeat: str, N: int) -> bool:
    """Return whether a text is the request N times, divided by `******`."""
    parts = text.split("******")
    return len(parts) == N and all(copied(part, prompt_to_repeat=prompt_to_repeat) for part in parts)


def copied_span(text: str, *, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """Return whether a text is the part of the request between two characters."""
    return copied(text, prompt_to_repeat=prompt_to_repeat[n_start:n_end])


def lowercase_counting(text: str, *, N: int) -> bool:
    """Return whether a text has at most so many lowercase words."""
    return len(re.findall(r"\b[a-z]+\b", text)) <= N


def counting_composition(text: str, *, n_sent: int, n_words: int) -> bool:
    """Return whether a text has three paragraphs of so many sentences of so many words, punctuation among them."""
    parts = [sentences(part) for part in paragraphs(text, DIVIDER) or []]
    tokens = [re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", sentence) for part in parts for sentence in part]
    return [len(part) for part in parts] == [n_sent] * 3 and all(len(part) == n_words for part in tokens)


def count_unique(text: str) -> bool:
    """Return whether no word and no punctuation mark occurs twice."""
    tokens = re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", text)
    return len(tokens) == len(set(tokens))


def count_increment_word(text: str, *, keyword1: str, keyword2: str) -> bool:
    """Return whether one keyword occurs once and another twice."""
    return occurrences(text, keyword1) == 1 and occurrences(text, keyword2) == 2


MORE_CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:word_once": keyword_once,
    "keywords:word_count_different_numbers": keyword_frequency,
    "keywords:exclude_word_harder": word_excluded,
    "keywords:no_adjacent_consecutive": no_adjacent_letters,
    "keywords:keyword_specific_position": keyword_at_position,
    "keywords:palindrome": palindrome,
    "keywords:start_end": same_start_and_end,
    "letters:letter_counting": letter_counting,
    "letters:letter_counting2": letter_frequency,
    "paragraphs:paragraphs": lambda text: two_paragraphs(text, DIVIDER),
    "paragraphs:paragraphs2": lambda text: two_paragraphs(text, BLANK_LINE),
    "first_word:first_word_sent": first_word_of_sentences,
    "first_word:first_word_answer": first_word_of_answer,
    "last_word:last_word_sent": last_word_of_sentences,
    "last_word:last_word_answer": last_word_of_answer,
    "detectable_format:bigram_wrapping": bigram_wrapping,
    "detectable_format:square_brackets": square_brackets,
    "detectable_format:sentence_hyphens": sentence_hyphens,
    "copy:copying_simple": copied,
    "copy:copying_multiple": copied_times,
    "copy:copy": copied,
    "copy:copy_span_idx": copied_span,
    "count:lowercase_counting": lowercase_counting,
    "count:counting_composition": counting_composition,
    "count:count_unique": count_unique,
    "count:count_increment_word": count_increment_word,
    "punctuation:punctuation_dot": lambda text: "." not in text,
    "punctuation:punctuation_exclamation": lambda text: "!" not in text,
}
