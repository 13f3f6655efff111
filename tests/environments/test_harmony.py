"""harmony.py: what gpt-oss writes, read by our parser and by OpenAI's with the real vocabulary, case by case."""

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from lit_puzzle.environments import harmony
from lit_puzzle.environments.completion import ParsedCompletion, Status

THOUGHT = "<|channel|>analysis<|message|>three and four<|end|><|start|>assistant"
CASES: list[tuple[str, str | None, Status, str | None]] = [  # completion, final, status, analysis
    (THOUGHT + "<|channel|>final<|message|>7<|return|>", "7", "final", "three and four"),
    (THOUGHT + "<|channel|>final<|message|>7<|endoftext|>", "7", "final", "three and four"),
    (THOUGHT + "<|channel|>final<|message|>7<|end|>", None, "unfinished", "three and four"),
    (THOUGHT + "<|channel|>final<|message|>7", None, "unfinished", "three and four"),
    (THOUGHT + "<|channel|>fin", None, "unfinished", "three and four"),
    (THOUGHT, None, "unfinished", "three and four"),
    ("<|channel|>analysis<|message|>three and", None, "unfinished", "three and"),
    ("", None, "unfinished", None),
    ("<|channel|>analysis<|message|>7<|return|>", None, "no_final", "7"),
    (THOUGHT + "<|channel|>final<|message|> <|return|>", None, "no_final", "three and four"),
    (THOUGHT + "<|channel|>commentary<|message|>7<|return|>", None, "no_final", "three and four"),
    (
        THOUGHT + '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 7}<|call|>',
        None,
        "tool_call",
        "three and four",
    ),
    (
        "<|channel|>final<|message|>7<|end|><|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json"
        '<|message|>{"a": 7}<|call|>',
        None,
        "tool_call",
        None,
    ),
    (
        THOUGHT + '<|channel|>final <|constrain|>json<|message|>{"a": 7}<|return|>',
        '{"a": 7}',
        "final",
        "three and four",
    ),
    (
        THOUGHT + "<|channel|>final<|message|>6<|end|><|start|>assistant<|channel|>final<|message|>7<|return|>",
        "7",
        "final",
        "three and four",
    ),
    (
        "<|channel|>analysis<|message|>I shall say <|channel|>final<|message|>6 <|end|><|start|>assistant"
        "<|channel|>final<|message|>7<|return|>",
        "7",
        "final",
        "I shall say <|channel|>final<|message|>6 ",
    ),
    ("<|channel|>final<|message|>7<|return|>", "7", "final", None),
    ("<|channel|>final<|message|>7<|return|><|endoftext|><|endoftext|>", "7", "final", None),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>7<|return|>",
        "7",
        "final",
        "a\nb",
    ),
    ("analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>7<|return|>", None, "malformed", None),
    ("<|channel|>final<|message|>7<|end|><|start|>user<|message|>8<|return|>", None, "malformed", None),
    ("<|channel|>final<|message|>6 <|start|>7<|return|>", None, "malformed", None),
]


@pytest.fixture(scope="module")
def gpt_oss_tokenizer() -> PreTrainedTokenizerFast:
    """The vocabulary and the control tokens of gpt-oss."""
    folder = os.environ.get(harmony.VOCABULARY_VARIABLE)
    if folder is None:
        pytest.skip(f"{harmony.VOCABULARY_VARIABLE} is not set: scripts/harmony_vocabulary.sh gets the vocabulary")
    pytest.importorskip("openai_harmony")
    converter = TikTokenConverter(str(Path(folder) / harmony.VOCABULARY_FILE))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), name_or_path="gpt-oss")
    return tokenizer


@pytest.mark.parametrize(("completion", "final", "status", "analysis"), CASES)
def test_our_parser(completion: str, final: str | None, status: Status, analysis: str | None) -> None:
    assert harmony.parse_text(completion) == ParsedCompletion(final, analysis, status)
