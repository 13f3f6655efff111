"""harmony.py: what gpt-oss writes, read by our parser and by OpenAI's with the real vocabulary, case by case."""

import base64
import os
import random
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lit_puzzle.environments import harmony
from lit_puzzle.environments.answer_formats import answer_format
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


SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|reserved_200001|>", "<|return|>"]
SPECIAL += ["<|constrain|>", "<|reserved_200004|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"]
SPECIAL += [f"<|reserved_{number}|>" for number in (200009, 200010, 200011)] + ["<|call|>"]
FIRST_SPECIAL = 199_998
PIECES = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>", "assistant"]
PIECES += ["final", "analysis", "commentary", " to=functions.f", "json", "7", " ", "user", "<|endoftext|>", "<|"]


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    """The file of o200k, which scripts/harmony_vocabulary.sh fetches."""
    pytest.importorskip("openai_harmony", reason="pip install 'lit-puzzle[harmony]'")
    folder = os.environ.get(harmony.VOCABULARY_VARIABLE)
    if folder is None:
        pytest.skip(f"{harmony.VOCABULARY_VARIABLE} is not set: scripts/harmony_vocabulary.sh gets the vocabulary")
    return Path(folder) / harmony.VOCABULARY_FILE


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> PreTrainedTokenizerFast:
    """A tokenizer with the vocabulary and the control tokens of gpt-oss at their places (without merges)."""
    character = bytes_to_unicode()
    rows = [line.split() for line in vocabulary.read_bytes().splitlines()]
    ids = {"".join(character[byte] for byte in base64.b64decode(token)): int(number) for token, number in rows}
    model = Tokenizer(models.BPE(vocab=ids, merges=[]))
    model.add_special_tokens(SPECIAL)
    assert model.token_to_id("<|startoftext|>") == FIRST_SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=model, name_or_path="gpt-oss", eos_token="<|return|>")


@pytest.mark.parametrize(("completion", "final", "status", "analysis"), CASES)
def test_our_parser(completion: str, final: str | None, status: Status, analysis: str | None) -> None:
    assert harmony.parse_text(completion) == ParsedCompletion(final, analysis, status)


@pytest.mark.parametrize(("completion", "final", "status", "analysis"), CASES)
def test_the_library(
    completion: str, final: str | None, status: Status, analysis: str | None, vocabulary: Path
) -> None:
    assert harmony.parse_with_library(completion) == ParsedCompletion(final, analysis, status)


def test_both_find_the_same_final_texts(vocabulary: Path) -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(4000):
        start = rng.choice(["", "<|channel|>final<|message|>", THOUGHT, THOUGHT + "<|channel|>final<|message|>"])
        text = start + "".join(rng.choices(PIECES, k=rng.randrange(1, 9)))
        ours, theirs = harmony.parse_text(text), harmony.parse_with_library(text)
        assert ours.final == theirs.final, text
        found += ours.final is not None
    assert found > 100


def test_the_vocabulary_file_is_made_from_the_tokenizer(
    vocabulary: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert harmony.vocabulary_bytes(tokenizer) == vocabulary.read_bytes()
    monkeypatch.delenv(harmony.VOCABULARY_VARIABLE)
    harmony._encoding.cache_clear()
    harmony.load_vocabulary(tokenizer)
    assert harmony.VOCABULARY_VARIABLE not in os.environ and harmony.parse_with_library(CASES[0][0]).final == "7"
    harmony._encoding.cache_clear()
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ValueError, match="openai-harmony cannot load its vocabulary"):
        harmony.load_vocabulary(other)


def test_the_format_of_the_real_vocabulary_is_read_by_the_library(
    vocabulary: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    form = answer_format(tokenizer)
    assert form.library and form.name == "harmony" and form.parse(form.wrap("7")).final == "7"


@pytest.mark.parametrize("text", ["<|channel|>" * 20_000, "<|end|>" * 20_000, "a" * 200_000, (THOUGHT + "\n") * 4_000])
def test_no_text_takes_long(text: str) -> None:
    begun = time.process_time()
    assert harmony.parse_text(text).final is None
    assert harmony.parse_text(THOUGHT + text + "<|return|>").final is None
    assert time.process_time() - begun < 2
