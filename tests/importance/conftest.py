"""A small parent and the sequences that its experts are scored on."""

from pathlib import Path
from typing import Any

import pytest
from helpers.importance_runs import write_sequences


@pytest.fixture
def parent(tiny_model: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "parent"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    return write_sequences(tmp_path / "sequences.jsonl")
