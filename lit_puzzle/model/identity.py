"""Identity of a checkpoint folder: a hash of each part that a run depends on.

Reads the folder's headers, the pages that the fingerprint covers, and its small files; writes nothing.
Files that no stage reads (a README) do not count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.run.files import read_json, read_text
from lit_puzzle.run.identity import Identity, files_hash, text_hash

TOKENIZER_SETTINGS = "tokenizer_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
OTHER_FILES = ("generation_config.json", "plan.json", "generation_lengths.json")


def checkpoint_identity(checkpoint: Checkpoint | Path) -> Identity:
    """Return the identity of a checkpoint: `weights`, `config`, `tokenizer`, `chat_template` and other files it has.

    Args:
        checkpoint: an opened checkpoint, or its folder.

    Raises:
        ValueError: the folder is not a valid checkpoint.
    """
    opened = Checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    folder = opened.folder
    content = {"weights": opened.fingerprint(), "config": _config_hash(opened.config)}
    content |= tokenizer_content(folder)
    for name in OTHER_FILES:
        if (folder / name).is_file():
            content[name.removesuffix(".json")] = files_hash(folder, [name])
    return Identity(str(folder), content)


def config_identity(folder: Path) -> Identity:
    """Return the identity of a folder of which config.json alone counts: that part of a checkpoint's."""
    return Identity(str(folder), {"config": _config_hash(read_json(folder / "config.json"))})


def _config_hash(config: Mapping[str, Any]) -> str:
    return text_hash(json.dumps(config, sort_keys=True))


def tokenizer_content(folder: Path) -> dict[str, str]:
    """Return hashes of `tokenizer` and `chat_template`, as far as the folder has them."""
    settings = read_json(folder / TOKENIZER_SETTINGS) if (folder / TOKENIZER_SETTINGS).is_file() else {}
    template = json.dumps(settings.pop("chat_template", None), sort_keys=True)
    files = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    templates = [name for name in TEMPLATE_FILES if (folder / name).is_file()]
    content = {}
    if files or settings:
        content["tokenizer"] = text_hash(files_hash(folder, files), json.dumps(settings, sort_keys=True))
    if templates:  # they win over the one in the settings
        content["chat_template"] = files_hash(folder, templates)
    elif template != "null":
        content["chat_template"] = text_hash(template)
    return content


def reads_clock(folder: Path) -> bool:
    """Return whether the chat template of a checkpoint folder asks for the date, as that of gpt-oss does."""
    files = (folder / name for name in (*TEMPLATE_FILES, TOKENIZER_SETTINGS))
    return any("strftime_now" in read_text(file) for file in files if file.is_file())


def weights_identity(checkpoint: Checkpoint | Path) -> Identity:
    """Return the identity of the weights of a checkpoint that a run has written, given opened or by its folder."""
    opened = Checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    return Identity(str(opened.folder), {"weights": opened.fingerprint()})
