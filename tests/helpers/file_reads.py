"""Which files are read, and how often, observed at the functions that read them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lit_puzzle.library import trained_blocks
from lit_puzzle.model import safetensors_file


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Count from now on how often the header of each safetensors file and each text file is read."""
    counts: Counter[Path] = Counter()
    read_header, open_file = safetensors_file.read_header, Path.open

    def counted_header(path: Path) -> Any:
        counts[path] += 1
        return read_header(path)

    def counted_open(path: Path, *given: Any, **named: Any) -> Any:
        counts[path] += path.suffix != ".safetensors"
        return open_file(path, *given, **named)

    for module in (safetensors_file, trained_blocks):
        monkeypatch.setattr(module, "read_header", counted_header)
    monkeypatch.setattr(Path, "open", counted_open)
    return counts
