"""Evaluations before and after a training: a resumed run does not repeat the first one, and does not go without it."""

from pathlib import Path

import pytest

from lit_puzzle.evaluate.before_after import is_measured


def test_a_resumed_run_has_measured_before_or_is_refused(tmp_path: Path) -> None:
    assert not is_measured(tmp_path / "before", 0)
    with pytest.raises(ValueError, match=r"before is missing: there is nothing to compare with\. Use --overwrite"):
        is_measured(tmp_path / "before", 1)
    (tmp_path / "before").mkdir()
    assert is_measured(tmp_path / "before", 0) and is_measured(tmp_path / "before", 1)
