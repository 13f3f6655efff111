"""Graders of texts take time proportional to a text, whatever the text: a megabyte of anything is graded in seconds."""

import json
import time

import pytest

from lit_puzzle.environments.graders.choice_answers import stated_choice
from lit_puzzle.environments.graders.code_tests import program_of, same_output
from lit_puzzle.environments.graders.exact_answers import same_text
from lit_puzzle.environments.graders.instructions import KNOWN, grade_instructions
from lit_puzzle.environments.graders.math_answers import stated_expression, unreadable
from lit_puzzle.environments.graders.number_answers import stated_number
from lit_puzzle.environments.long_context_tasks import RecordCount
from lit_puzzle.environments.looping import is_looping, words_of

VALUES = {
    **dict.fromkeys(
        ("num_sentences", "num_paragraphs", "num_words", "num_placeholders", "num_bullets", "N", "n", "m"), 3
    ),
    **dict.fromkeys(("num_highlights", "num_sections", "frequency", "let_frequency", "capital_frequency", "n_sent"), 3),
    **dict.fromkeys(("nth_paragraph", "n_words", "n_start", "n_end"), 1),
    **dict.fromkeys(("relation", "let_relation", "capital_relation"), "at least"),
    **dict.fromkeys(
        ("keyword", "keyword1", "keyword2", "first_word", "last_word", "end_phrase", "section_spliter"), "a"
    ),
    "keywords": ["a+", "(a|a)*$"],
    "forbidden_words": ["a", "b"],
    "letter": "a",
    "language": "en",
    "postscript_marker": "P.S.",
    "prompt_to_repeat": "a b",
}
HOSTILE = {
    "digits in groups": "1" + ",234" * 250_000,
    "digits": "9" * 1_000_000,
    "boxes": "\\boxed{" * 140_000,
    "fractions": "\\frac{" * 160_000,
    "parentheses": "(" * 1_000_000,
    "towers": "2^{" * 200_000 + "2" + "}" * 200_000,
    "signs": "-+" * 500_000,
    "blanks before an answer": "answer" + " " * 1_000_000 + "is 7",
    "blanks": " " * 1_000_000 + "B",
    "answers": "the answer is " * 70_000,
    "bold": "**" * 500_000,
    "open bold": "**a" * 300_000,
    "fences": "```\n" * 250_000,
    "fence and blanks": "```" + " " * 1_000_000 + "a",
    "points": "." * 1_000_000 + "a",
    "quotes after points": "." + '"' * 1_000_000 + "a",
    "abbreviations": "A. " * 60_000,
    "letters": "A " * 500_000,
    "brackets": "[" * 1_000_000,
    "angles": "<<" * 500_000,
    "lines": "\n" * 1_000_000 + "a",
    "stars in lines": "* \n" * 300_000,
    "text commands": "\\text{" * 160_000,
    "equations": "= " * 500_000,
    "one word": "a" * 1_000_000,
    "hyphens": "a-" * 500_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_long(name: str) -> None:
    text = HOSTILE[name]
    begun = time.process_time()
    stated_number(text)
    stated_choice(text)
    expression = stated_expression(text)
    assert expression is None or len(expression) <= 2_000 or unreadable(expression)
    same_text(text, "a")
    program_of(text)
    same_output(text, "a")
    is_looping(words_of(text))
    RecordCount().verify(text, "3")
    assert time.process_time() - begun < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_an_instruction_long(name: str) -> None:
    text = HOSTILE[name][:200_000]
    for known, check in KNOWN.items():
        code = check.__code__
        named = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        gold = json.dumps({"instruction_id_list": [known], "kwargs": [{key: VALUES[key] for key in named}]})
        begun = time.process_time()
        grade_instructions(text, gold)
        assert time.process_time() - begun < 3, known
