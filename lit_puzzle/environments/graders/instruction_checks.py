"""Checks whether a text follows an instruction of IFEval (arXiv 2311.07911): lengths, keywords, format, case, language.

One function an instruction: the text first, then what the instruction says, all of it needed (other checkers draw at
random what a row leaves out). Keywords are taken literally. Two counts differ from IFEval's own, which need data files:
sentences and words in capitals are counted by `text_units`.

Language is detected by langdetect with a fixed seed; a text without any letters is of no language.

Reads and writes nothing. Time proportional to the text.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lit_puzzle.environments.graders.exact_answers import without_fence
from lit_puzzle.environments.graders.text_units import DIVIDER, paragraphs, sentences, whole_words, words

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": lambda count, bound: count < bound,
    "at most": lambda count, bound: count <= bound,
    "exactly": lambda count, bound: count == bound,
    "at least": lambda count, bound: count >= bound,
    "more than": lambda count, bound: count > bound,
}
RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
BLANK_LINE = re.compile(r"\n\n")
LANGUAGE_CHARACTERS = 4_000  # a language shows in the beginning of a text


def occurrences(text: str, keyword: str) -> int:
    """Return how often a keyword stands in a text, in any case, also inside of words."""
    return len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE))


def keywords_exist(text: str, *, keywords: Sequence[str]) -> bool:
    """Return whether every keyword occurs."""
    return all(occurrences(text, keyword) for keyword in keywords)


def keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """Return whether a keyword occurs so often."""
    return RELATIONS[relation](occurrences(text, keyword), frequency)


def no_forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    """Return whether none of the words occurs as a word."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Return whether a letter occurs so often, in any case."""
    return RELATIONS[let_relation](Counter(text.lower())[letter.lower()], let_frequency)


def in_language(text: str, *, language: str) -> bool:
    """Return whether a text is written in a language."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return bool(detect(text[:LANGUAGE_CHARACTERS]) == language)
    except LangDetectException:  # no letters
        return False


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """Return whether a text has so many sentences."""
    return RELATIONS[relation](len(sentences(text)), num_sentences)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Return whether a text has so many paragraphs, divided by `***`."""
    return len(paragraphs(text, DIVIDER) or []) == num_paragraphs


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    """Return whether a text has so many words."""
    return RELATIONS[relation](len(words(text)), num_words)


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Return whether a text has so many paragraphs, divided by blank lines, and the n-th begins with a word."""
    parts = [part.strip() for part in BLANK_LINE.split(text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    begin = re.match(r"['\"“‘]*([^\s.,?!'\"]*)", parts[nth_paragraph - 1])
    return begin is not None and begin[1].lower() == first_word.lower()


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """Return whether a text has at least so many placeholders, `[name]`."""
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """Return whether a postscript follows, as `P.S.` or `P.P.S`."""
    pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(postscript_marker.strip())
    return re.search(pattern or re.escape(postscript_marker.strip()), text, re.IGNORECASE) is not None


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Return whether a text has exactly so many bullet points, `* ` or `- `."""
    return len(re.findall(r"^[ \t]*(?:\*[^*\n]|-)", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    """Return whether one of the three allowed answers is given."""
    return any(response in text for response in RESPONSES)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """Return whether a text has at least so many highlighted parts, `*part*`."""
    return sum(bool(part.strip()) for part in re.findall(r"\*\*?([^\n*]+)\*", text)) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """Return whether a text has at least so many sections, each under a heading such as `Section 1`."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d", text)) >= num_sections


def json_format(text: str) -> bool:
    """Return whether the whole text is JSON, in a code block or not."""
    try:
        json.loads(without_fence(text))
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """Return whether a text has a title, `<<title>>`."""
    return any(part.strip() for part in re.findall(r"<<([^<>\n]+)>>", text))


def two_responses(text: str) -> bool:
    """Return whether a text has two different answers, divided by `******`."""
    parts = paragraphs(text, re.compile(r"\*{6}"))
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """Return whether a text begins with the request."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, *, end_phrase: str) -> bool:
    """Return whether a text ends with a phrase."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_words(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Return whether so many words are in capitals."""
    return RELATIONS[capital_relation](sum(word.isupper() for word in whole_words(text)), capital_frequency)


def english_capital(text: str) -> bool:
    """Return whether a text is English in capitals."""
    return text.isupper() and in_language(text.lower(), language="en")


def english_lowercase(text: str) -> bool:
    """Return whether a text is English in small letters."""
    return text.islower() and in_language(text, language="en")


def quotation(text: str) -> bool:
    """Return whether a text stands in double quotation marks."""
    return len(text.strip()) > 1 and text.strip().startswith('"') and text.strip().endswith('"')


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords_exist,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": no_forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": in_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": ends_with,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": lambda text: "," not in text,
}


def parameters(check: Callable[..., Any]) -> set[str]:
    """Return the names of what an instruction says beside its kind."""
    code = check.__code__
    return set(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])
