"""Tokenizer, chat template and stop tokens of an exported folder.

Copies the tokenizer's files and finds the tokens that end a completion from the files alone: no code in a folder is
executed. In the harmony format a completion ends with <|return|>, a tool call with <|call|>, a document with
<|endoftext|>; an engine that does not know all three does not stop after tool calls.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_puzzle.child.child import generation_config
from lit_puzzle.child.folder import OPTIONAL_TOKENIZER_FILES, TEMPLATE_FILES, TOKENIZER_FILES
from lit_puzzle.model.layout import whole
from lit_puzzle.run.files import read_json

STOP_WORDS = ("<|return|>", "<|endoftext|>", "<|call|>")


def check_tokenizer(folder: Path) -> None:
    """Check that a folder has a tokenizer with a chat template that works without code from the folder.

    Raises:
        ValueError: a file or the chat template is missing, or the tokenizer's class is code in the folder.
    """
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}; an exported folder needs it: name the folder of a "
            "tokenizer (--tokenizer=FOLDER)"
        )
    settings = read_json(folder / "tokenizer_config.json")
    if "auto_map" in settings:
        raise ValueError(
            f"{folder}/tokenizer_config.json names code in the folder ({settings['auto_map']}), which is never run or "
            "copied; name the folder of a tokenizer without code (--tokenizer=FOLDER)"
        )
    if "chat_template" not in settings and not any((folder / name).is_file() for name in TEMPLATE_FILES):
        raise ValueError(
            f"{folder} has no chat template ({TEMPLATE_FILES[0]}, or chat_template in tokenizer_config.json); name the "
            "folder of a tokenizer that has one (--tokenizer=FOLDER)"
        )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files and chat template."""
    for name in (*TOKENIZER_FILES, *TEMPLATE_FILES, *OPTIONAL_TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def stop_tokens(tokenizer: Path) -> list[int]:
    """Return the ids of the tokens that end a completion: those of `STOP_WORDS`, and the end-of-text token.

    Raises:
        ValueError: the tokenizer's list of added tokens is malformed.
    """
    added = read_json(tokenizer / "tokenizer.json").get("added_tokens", [])
    try:
        ids = {str(token["content"]): int(token["id"]) for token in added}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{tokenizer}/tokenizer.json: added_tokens is malformed: {error!r}") from error
    end = read_json(tokenizer / "tokenizer_config.json").get("eos_token")
    end_word = end.get("content") if isinstance(end, Mapping) else end
    return [ids[word] for word in dict.fromkeys((*STOP_WORDS, end_word)) if word in ids]


def generation_settings(checkpoint: Path, tokenizer: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's generation config with every stop token: its own, the model's and the tokenizer's.

    Args:
        checkpoint: folder of the checkpoint.
        tokenizer: folder of the tokenizer.
        config: config.json of the model.

    Raises:
        ValueError: no stop token is known, or one is not in the vocabulary.
    """
    settings = generation_config(checkpoint, config)
    stops = list(dict.fromkeys([*(settings["eos_token_id"] or []), *stop_tokens(tokenizer)]))
    outside = [token for token in stops if not 0 <= token < whole(config, "vocab_size")]
    if outside or not stops:
        raise ValueError(
            f"the stop tokens of {checkpoint} and {tokenizer} are {stops}; at least one is needed, and all must be "
            f"below the vocabulary size {config['vocab_size']}. Is this the model's own tokenizer?"
        )
    return {**settings, "eos_token_id": stops}
