"""graders/instructions.py and its checks: each instruction followed and not, and if-verifiable as an oracle."""

import itertools
import json
from typing import Any

import pytest

from lit_puzzle.environments.graders.instruction_checks import CHECKS, parameters
from lit_puzzle.environments.graders.instructions import KNOWN, grade_instructions, read_instructions
from lit_puzzle.environments.graders.more_instruction_checks import MORE_CHECKS
from lit_puzzle.environments.graders.text_units import paragraphs, sentences, whole_words, words

# id: (what the instruction says, a text that follows it, one that does not)
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["rain", "c++"]}, "Rain and C++.", "Rain."),
    "keywords:frequency": ({"keyword": "rain", "frequency": 2, "relation": "at least"}, "rain, Rain", "rain"),
    "keywords:forbidden_words": ({"forbidden_words": ["rain"]}, "It was raining.", "No rain."),
    "keywords:letter_frequency": ({"letter": "z", "let_frequency": 2, "let_relation": "less than"}, "Zoo", "zZ"),
    "language:response_language": (
        {"language": "de"},
        "Das ist ein ganz normaler deutscher Satz über das Wetter.",
        "This is a perfectly ordinary sentence about the weather.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "One. Mr. X came.",
        "A b. C d. E f.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen, it rained.",
        "First.\n\nIt rained.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] at [place]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. It rains.", "Bye."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n- two", "* one"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and **two**", "*one*"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', '{"a": 1'),
    "detectable_format:title": ({}, "<<Rain>>\nIt rains.", "<<>>\nIt rains."),
    "combination:two_responses": ({}, "one ****** two", "one ****** one"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Why rain?"}, "Why rain?\nClouds.", "Clouds."),
    "startend:end_checker": ({"end_phrase": "The end."}, "It rained. The end.", "The end. It rained"),
    "startend:quotation": ({}, '"It rains."', "It rains."),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "IT RAINS today",
        "IT rains",
    ),
    "change_case:english_capital": ({}, "THIS IS WRITTEN IN CAPITAL LETTERS ALL OVER.", "This is not."),
    "change_case:english_lowercase": ({}, "this is written in small letters all over.", "This is not."),
    "punctuation:no_comma": ({}, "No such sign", "One, two"),
    "keywords:word_once": ({"keyword": "rain"}, "the rain", "rain rain"),
    "keywords:word_count_different_numbers": (
        {"keyword": "rain", "frequency": 2, "relation": "less than"},
        "rain",
        "rain rain",
    ),
    "keywords:exclude_word_harder": ({"keyword": "rain"}, "Rain is wet", "the rain is wet"),
    "keywords:no_adjacent_consecutive": ({}, "cat apple", "apple banana"),
    "keywords:keyword_specific_position": ({"keyword": "rain", "n": 2, "m": 3}, "Hi. I like rain.", "Hi. I rain."),
    "keywords:palindrome": ({}, "a level road", "it rains here"),
    "keywords:start_end": ({}, "Rain, I like rain", "Rain, I like rain."),
    "letters:letter_counting": ({"N": 3, "relation": "at least"}, "a1b2c", "a1b"),
    "letters:letter_counting2": ({"letter": "a", "let_frequency": 2, "let_relation": "at least"}, "Anna", "ann"),
    "paragraphs:paragraphs": ({}, "one *** two", "one"),
    "paragraphs:paragraphs2": ({}, "one\n\ntwo", "one\ntwo"),
    "first_word:first_word_sent": ({"first_word": "Rain"}, "Rain falls. Rain stops.", "Rain falls. It stops."),
    "first_word:first_word_answer": ({"first_word": "Rain"}, "rain falls", "it rains"),
    "last_word:last_word_sent": ({"last_word": "rain"}, "I like rain. You like rain!", "I like rain. You do not."),
    "last_word:last_word_answer": ({"last_word": "rain"}, "I like rain.", "rain is fine"),
    "detectable_format:bigram_wrapping": ({}, "<<I am>> <<at home>>", "<<I am>> at home"),
    "detectable_format:square_brackets": ({}, "[I] [am]", "[I am"),
    "detectable_format:sentence_hyphens": ({}, "One sentence.-Two sentences.", "One sentence. - Two sentences."),
    "copy:copying_simple": ({"prompt_to_repeat": "Why?"}, " why? ", "Why? Because."),
    "copy:copying_multiple": ({"prompt_to_repeat": "Why?", "N": 2}, "Why? ****** Why?", "Why?"),
    "copy:copy": ({"prompt_to_repeat": "Why?"}, "Why?", "Who?"),
    "copy:copy_span_idx": ({"prompt_to_repeat": "Why not?", "n_start": 4, "n_end": 7}, "not", "why"),
    "count:lowercase_counting": ({"N": 1}, "THE rain FALLS", "the rain"),
    "count:counting_composition": ({"n_sent": 1, "n_words": 3}, "It rains. *** It stops. *** It ends.", "It rains."),
    "count:count_unique": ({}, "every word once", "the rain the"),
    "count:count_increment_word": ({"keyword1": "sun", "keyword2": "rain"}, "sun rain rain", "sun rain"),
    "punctuation:punctuation_dot": ({}, "no dot", "a dot."),
    "punctuation:punctuation_exclamation": ({}, "calm.", "loud!"),
}


def gold(name: str, said: dict[str, Any]) -> str:
    return read_instructions({"instruction_id_list": [name], "kwargs": [said]}, "file:1")


def test_every_instruction_has_a_case() -> None:
    assert set(CASES) == set(KNOWN) and len(KNOWN) == len(CHECKS) + len(MORE_CHECKS) == 53


@pytest.mark.parametrize("name", CASES)
def test_each_instruction_is_followed_and_not(name: str) -> None:
    said, follows, does_not = CASES[name]
    assert parameters(KNOWN[name]) == set(said)
    assert grade_instructions(follows, gold(name, said)).correct == 1.0
    verdict = grade_instructions(does_not, gold(name, said))
    assert verdict.correct == 0.0 and verdict.reason == f"wrong: 1 of 1 instructions: {name}"
    assert grade_instructions("  ", gold(name, said)).correct == 0.0


def test_several_at_once_are_all_needed() -> None:
    names = ["length_constraints:number_words", "punctuation:no_comma", "keywords:existence"]
    said = [{"num_words": 4, "relation": "less than"}, None, {"keywords": ["rain"], "keyword": None}]
    both = read_instructions({"instruction_id_list": names, "kwargs": said}, "file:1")
    assert grade_instructions("Only rain", both).correct == 1.0
    assert grade_instructions("Rain, rain, rain, rain", both).reason.startswith("wrong: 2 of 3 instructions: length")
    assert json.loads(both)["kwargs"] == [{"num_words": 4, "relation": "less than"}, {}, {"keywords": ["rain"]}]


def test_whole_numbers_that_a_table_made_fractions_of_are_read() -> None:
    said = {"num_words": 4.0, "relation": "at least", "keywords": None}
    assert json.loads(gold("length_constraints:number_words", said))["kwargs"] == [
        {"num_words": 4, "relation": "at least"}
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"instruction_id_list": ["no:such"], "kwargs": [{}]}, "the instruction 'no:such' is not known"),
        (
            {"instruction_id_list": ["keywords:frequency"], "kwargs": [{"keyword": "a"}]},
            r"needs \['frequency', 'relation'\]",
        ),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "of equal lengths"),
        ({"instruction_id_list": [], "kwargs": []}, "must have the form"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "rain"}]}, "keywords is 'rain'"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3.5, "relation": "at least"}],
            },
            "num_words is '3.5'",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "about"}],
            },
            "relation is 'about'",
        ),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [3]}, "an object or null is expected"),
        ({"instruction_id_list": [["a"]], "kwargs": [{}]}, "is not known"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": [" "]}]}, "which it cannot be"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": float("inf"), "relation": ["about"]}],
            },
            "which it cannot be|relation is",
        ),
        ("text", "must have the form"),
    ],
)
def test_instructions_that_cannot_be_read_are_refused_by_their_place(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_instructions(value, "file:5")
    assert str(refused.value).startswith("file:5")


UNLIKE = {  # sentences and words in capitals need NLTK's data there; a prompt is repeated from its own argument
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
}
TEXTS = [
    *(text for _, follows, does_not in CASES.values() for text in (follows, does_not)),
    "* one\n* two\n- three\n\nP.P.S. the end.",
    "one *** *** two",
    "******",
    "*a* **b** *c*\n<<t>>\n[x] [y] [z]",
    '"MY ANSWER IS NO."',
    "My answer is maybe. SECTION 3 Section 4",
]
DIFFERENT = [  # dividers are no highlighted parts here, and a text without letters is in no language
    ("detectable_format:number_highlighted_sections", "It rains. *** It stops. *** It ends."),
    ("language:response_language", "******"),
]


def test_checks_agree_with_if_verifiable() -> None:
    """The same verdict on every text, for every instruction of IFEval that is counted alike."""
    registry = pytest.importorskip("if_verifiable.ifeval.instructions_registry").INSTRUCTION_DICT
    import langdetect

    langdetect.DetectorFactory.seed = 0
    assert set(registry) == set(CHECKS)
    different = []
    for name, text in itertools.product(sorted(set(CHECKS) - UNLIKE), TEXTS):
        said = {"keywords": ["rain"]} if name == "keywords:existence" else CASES[name][0]  # `c++` is a pattern there
        checker = registry[name](name)
        checker.build_description(**said)
        if bool(checker.check_following(text)) != KNOWN[name](text, **said):
            different.append((name, text))
    assert different == DIFFERENT


def test_texts_are_divided() -> None:
    text = 'Dr. Smith of the U.S. Army said "Hi!" Then... 3.5 is a number, e.g. here. Right?\n- one\n- two'
    assert sentences(text) == [
        'Dr. Smith of the U.S. Army said "Hi!"',
        "Then...",
        "3.5 is a number, e.g. here.",
        "Right?",
        "- one",
        "- two",
    ]
    assert words("don't") == ["don", "t"] and whole_words("don't well-known") == ["don't", "well-known"]
    assert paragraphs("*** a *** b ***") == ["a", "b"] and paragraphs("a *** *** b") is None
    assert sentences("") == [] and sentences("...") == []
