"""The parent that children are made of here."""

from pathlib import Path

import pytest
from transformers import GptOssForCausalLM


@pytest.fixture
def parent(tmp_path: Path, tiny_model: GptOssForCausalLM) -> Path:
    """The tiny model with the files that a checkpoint folder has beside its weights."""
    tiny_model.save_pretrained(tmp_path / "parent")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_lengths.json", "README.md"):
        (tmp_path / "parent" / name).write_text(f"content of {name}")
    return tmp_path / "parent"
