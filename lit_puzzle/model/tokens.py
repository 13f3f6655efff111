"""Texts to token ids by a checkpoint's tokenizer, and whether transformers built the tokenizer that its file describes.

tokenizers raises its errors as bare `Exception`s; here they become errors of the user that name the tokenizer's file.
Reads and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lit_puzzle.run.library_calls import library_errors

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
NO_MODEL = {"type": "WordLevel", "vocab": {}, "unk_token": ""}


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text; control tokens in it count as such, none is added.

    Raises:
        ValueError: the tokenizer cannot encode the text, for example for lack of a token for unknown characters.
    """
    with library_errors(Path(tokenizer.name_or_path) / TOKENIZER_FILE):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_read_as_stored(folder: Path, content: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer splits texts as its tokenizer.json says.

    transformers builds some classes (`LlamaTokenizer`, `GPT2Tokenizer`) from the vocabulary of the file and steps of
    its own; engines that read the file would then have other token ids.

    Args:
        folder: of the tokenizer.
        content: its tokenizer.json.
        tokenizer: what transformers made of the folder.

    Raises:
        ValueError: tokenizer_config.json has a class or a setting that reads the file differently.
    """
    settings = folder / TOKENIZER_CONFIG
    if tokenizer.split_special_tokens:
        raise ValueError(f"{settings}: split_special_tokens must be false: prompts need their control tokens whole")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"{settings}: model_max_length must be a number, got {tokenizer.model_max_length!r}")
    with library_errors(folder / TOKENIZER_FILE):
        stored = Tokenizer.from_str(json.dumps({**content, "model": NO_MODEL, "added_tokens": []}))
        used = _steps(tokenizer.backend_tokenizer)
        differing = [name for name, step in _steps(stored).items() if step != used[name]]
    if differing:
        raise ValueError(
            f"{settings}: the tokenizer_class {type(tokenizer).__name__} has another {' and '.join(differing)} than "
            f"{TOKENIZER_FILE}, so that the same text has other token ids; name the class TokenizersBackend"
        )


def _steps(tokenizer: Tokenizer) -> dict[str, object]:
    steps = {
        "normalizer": tokenizer.normalizer,
        "pre_tokenizer": tokenizer.pre_tokenizer,
        "decoder": tokenizer.decoder,
    }
    return {name: None if step is None else json.loads(step.__getstate__()) for name, step in steps.items()}
