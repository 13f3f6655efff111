"""tokens.py: what a tokenizer cannot encode is the user's error; one that is read differently is refused."""

import json
import shutil
from pathlib import Path

import pytest

from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.model.tokens import token_ids

CHILD = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_child"


def changed(folder: Path, file: str, **entries: object) -> Path:
    """Return a copy of a child with entries of a file changed."""
    shutil.copytree(CHILD, folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | entries))
    return folder


def test_control_tokens_are_whole_and_none_is_added() -> None:
    tokenizer = load_tokenizer(CHILD)
    ids = token_ids(tokenizer, "<|start|>user<|message|>")
    assert len(ids) == 3 and tokenizer.decode(ids) == "<|start|>user<|message|>"


def test_text_that_cannot_be_encoded_names_the_file(tmp_path: Path) -> None:
    model = json.loads((CHILD / "tokenizer.json").read_text())["model"]
    folder = changed(tmp_path / "child", "tokenizer.json", model=model | {"vocab": {}})
    with pytest.raises(ValueError, match=r"child/tokenizer\.json cannot be used: Exception: .*UNK"):
        token_ids(load_tokenizer(folder), "sort ab")


def test_regular_expression_that_backtracks_without_end_is_stopped(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "([^Z]+)+\\b\\B"}, "behavior": "Isolated", "invert": False}
    folder = changed(tmp_path / "child", "tokenizer.json", pre_tokenizer=split)
    with pytest.raises(ValueError, match=r"child/tokenizer\.json cannot be used: PanicException: .*retry-limit"):
        token_ids(load_tokenizer(folder), "sort abcdefgh" * 5)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_class_that_reads_the_file_differently_is_refused(tmp_path: Path, name: str) -> None:
    folder = changed(tmp_path / "child", "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: the tokenizer_class {name} has another .*pre_tok"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_class_that_reads_the_file_as_it_is_passes(tmp_path: Path, name: str) -> None:
    folder = changed(tmp_path / "child", "tokenizer_config.json", tokenizer_class=name)
    assert token_ids(load_tokenizer(folder), "sort ab") == token_ids(load_tokenizer(CHILD), "sort ab")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"split_special_tokens": True}, "split_special_tokens must be false"),
        ({"model_max_length": "x"}, "model_max_length must be a number, got 'x'"),
    ],
)
def test_setting_that_would_break_prompts_is_refused(tmp_path: Path, entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        load_tokenizer(changed(tmp_path / "child", "tokenizer_config.json", **entries))
