import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_puzzle.model.chat import render_chat
from lit_puzzle.model.opening import load_config, load_generation_config, load_tokenizer

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "tiny_child", tmp_path / "child"))


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_config_and_tokens_are_those_of_the_folder(folder: Path) -> None:
    config, content = load_config(folder), json.loads((folder / "config.json").read_text())
    assert config.model_type == "gpt_oss_puzzle" and config.block_configs == content["block_configs"]
    stated = json.loads((folder / "generation_config.json").read_text())
    tokens = load_generation_config(folder)
    assert (tokens.eos_token_id, tokens.pad_token_id) == (stated["eos_token_id"], stated["pad_token_id"])


def test_settings_of_decoding_are_not_taken(folder: Path) -> None:
    change(folder / "generation_config.json", no_repeat_ngram_size=2, num_beams=3, temperature=0.1)
    tokens = load_generation_config(folder)
    assert (tokens.no_repeat_ngram_size, tokens.num_beams, tokens.temperature) == (None, None, None)


def test_tokens_are_those_of_the_config_without_a_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=[3, 4], pad_token_id=5)
    tokens = load_generation_config(folder)
    assert (tokens.eos_token_id, tokens.pad_token_id) == ([3, 4], 5)


def test_tokenizer_is_that_of_the_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, padding_side="left")
    assert tokenizer.padding_side == "left"
    text = render_chat(tokenizer, [{"role": "user", "content": "1+1"}], reasoning_effort="high")
    assert "1+1" in text and "high" in text


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "llama"}, r"child/config\.json: model_type 'llama' is not supported"),
        ({"num_attention_heads": "four"}, r"child/config\.json: num_attention_heads must be a positive whole number"),
        ({"block_configs": [1, 2]}, r"child/config\.json: block_configs must list 6 layers"),
        ({"eos_token_id": "zero"}, r"child/config\.json cannot be used: StrictDataclass"),
    ],
)
def test_config_that_transformers_cannot_open_is_one_error(folder: Path, entries: Any, message: str) -> None:
    change(folder / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_config(folder)


def test_folder_name_of_the_hub_is_never_looked_up() -> None:
    for load in (load_config, load_tokenizer):
        with pytest.raises(ValueError, match="openai/gpt-oss-20b is not a folder"):
            load(Path("openai/gpt-oss-20b"))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    change(folder / "tokenizer.json", model={"type": "Nothing"})


def doubled_token(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "version": "1.0"}')


def more_tokens_than_the_model(folder: Path) -> None:
    change(folder / "config.json", vocab_size=64)


def added_token_of_another_id(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder / "tokenizer.json", added_tokens=[added[0] | {"id": 100_000}, *added[1:]])


def half_a_tokenizer(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content[: len(content) // 2])


def code_in_the_folder(folder: Path) -> None:
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    (folder / "code.py").write_text("raise SystemExit('this was run')")


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def settings_that_are_a_list(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


def template_with_a_typing_error(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}")


def template_that_never_compiles(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 9 ** (9 ** 9) }}")  # Jinja computes constants


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_tokenizer, r"child/tokenizer\.json is missing"),
        (broken_tokenizer, r"child/tokenizer\.json cannot be used"),
        (doubled_token, r"child/tokenizer\.json: the key 'version' is given twice"),
        (
            more_tokens_than_the_model,
            r"child/tokenizer\.json has the token 100, but .*config\.json has a vocab_size of 64",
        ),
        (added_token_of_another_id, r"child/tokenizer\.json: the added token .* has the id 100000, but it is read as"),
        (half_a_tokenizer, r"child/tokenizer\.json is not JSON"),
        (code_in_the_folder, r"child/tokenizer_config\.json names code in the folder"),
        (settings_that_are_a_list, r"child/tokenizer_config\.json must hold a JSON object, got list"),
        (template_that_never_compiles, "the chat template of .*child was stopped: it took more than 1 seconds"),
        (template_with_a_typing_error, "the chat template of .*child cannot be used: TemplateSyntaxError"),
    ],
)
def test_damaged_tokenizer_is_one_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setattr("lit_puzzle.model.chat.TEMPLATE_SECONDS", 1)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "was stopped: it took more than 1 seconds",
        ),
        ("{{ raise_exception('no system message') }}", "cannot be used: TemplateError: no system message"),
        ("{{ messages.nothing.at_all }}", "cannot be used: UndefinedError"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "cannot be used: SecurityError"),
    ],
)
def test_template_that_fails_or_never_ends_is_one_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr("lit_puzzle.model.chat.TEMPLATE_SECONDS", 1)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer, started = load_tokenizer(folder), time.process_time()
    with pytest.raises(ValueError, match=f"the chat template of .*child {message}"):
        render_chat(tokenizer, [{"role": "user", "content": "a"}])
    assert time.process_time() - started < 1
