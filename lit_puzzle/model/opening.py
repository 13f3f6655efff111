"""Opens configurations, tokenizers and chat templates of a folder by transformers: from disk alone, without its code.

Nothing is downloaded, whatever a folder is called; no code in a folder is run, and nobody is asked whether it may be.
What transformers, tokenizers and Jinja raise on a damaged file becomes one ValueError with folder, file and reason.
Reads the folder; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

import lit_puzzle.model.blocks  # noqa: F401  (registers the configurations of children)
from lit_puzzle.model.chat import TEMPLATE, check_template
from lit_puzzle.model.config import CONFIG_FILE, read_config
from lit_puzzle.model.tokens import TOKENIZER_CONFIG, TOKENIZER_FILE, check_read_as_stored
from lit_puzzle.run.files import check_regular, read_json, read_text
from lit_puzzle.run.library_calls import library_errors

GENERATION_FILE = "generation_config.json"
SETTINGS_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_TEMPLATE_BYTES = 1 << 20
OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a checkpoint folder.

    Raises:
        ValueError: `lit_puzzle.model.config` refuses config.json, or transformers does.
    """
    read_config(folder)
    with library_errors(folder / CONFIG_FILE):
        return AutoConfig.from_pretrained(folder, **OFFLINE)


def load_generation_config(folder: Path) -> GenerationConfig:
    """Return the special tokens of a folder's generation_config.json, without its settings of decoding.

    transformers and TRL fill in whatever a caller leaves open from the model's configuration; a recipe alone decides.

    Returns:
        Its tokens; those of config.json if there is no such file.

    Raises:
        ValueError: the file is damaged, or a special token is not in the vocabulary.
    """
    path, vocabulary = folder / GENERATION_FILE, read_config(folder)["vocab_size"]
    if path.exists():
        read_json(path)
        with library_errors(path):
            settings = GenerationConfig.from_pretrained(folder, local_files_only=True).to_dict()
    else:
        path, settings = folder / CONFIG_FILE, read_config(folder)
    for name in SPECIAL_TOKENS:
        _check_tokens(path, name, settings.get(name), vocabulary)
    with library_errors(path):
        return GenerationConfig(**{name: settings.get(name) for name in SPECIAL_TOKENS})


def _check_tokens(path: Path, name: str, tokens: object, vocabulary: int) -> None:
    for token in tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise ValueError(f"{path}: {name} must be tokens of the vocabulary of {vocabulary}, got {tokens!r}")


def load_tokenizer(folder: Path, **settings: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, with a chat template that compiles, if it has one.

    Args:
        folder: of a checkpoint, or of a tokenizer alone.
        **settings: of the tokenizer, such as `padding_side="left"`.

    Raises:
        ValueError: there is no tokenizer.json, a file is damaged, the tokenizer's class is code in the folder, or it
            has tokens that the model of the folder does not have.
    """
    path = _in_folder(folder, TOKENIZER_FILE)
    content = read_json(path)
    vocabulary = None
    if (folder / CONFIG_FILE).exists():  # transformers reads it, too
        vocabulary = int(load_config(folder).vocab_size)
    for name in SETTINGS_FILES:
        if (folder / name).exists() and "auto_map" in read_json(folder / name):
            raise ValueError(
                f"{folder / name} names code in the folder, which is never run: a tokenizer must need none"
            )
    if (folder / TEMPLATE).exists():
        read_text(folder / TEMPLATE, MAX_TEMPLATE_BYTES)
    with library_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(folder, **OFFLINE, **settings)
    ids = tokenizer.get_vocab()
    for token, number in _added_tokens(path, content.get("added_tokens") or []):
        if ids.get(token) != number:  # tokenizers keeps the id of a token that it knows, whatever the file says
            raise ValueError(
                f"{path}: the added token {token!r} has the id {number}, but it is read as {ids.get(token)}"
            )
    largest = max(ids.values(), default=-1)
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(f"{path} has the token {largest}, but {folder / CONFIG_FILE} has a vocab_size of {vocabulary}")
    check_read_as_stored(folder, content, tokenizer)
    for template in _templates(folder, tokenizer.chat_template):
        check_template(template, f"the chat template of {folder}")
    return tokenizer


def _added_tokens(path: Path, entries: object) -> list[tuple[object, object]]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: added_tokens must be a list of objects, got {str(entries)[:80]}")
    return [(entry.get("content"), entry.get("id")) for entry in entries]


def _templates(folder: Path, template: object) -> Sequence[str]:
    found = list(template.values()) if isinstance(template, Mapping) else [] if template is None else [template]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise ValueError(f"{folder / TOKENIZER_CONFIG}: chat_template must be a text, got {str(template)[:80]}")
    return texts


def _in_folder(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; a checkpoint is a folder with {CONFIG_FILE} and *.safetensors")
    check_regular(folder / name)
    return folder / name
