"""Some stages' measured peaks of anonymous memory are what the formulas of `--plan` say: a short run of the bench."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGEST_ERROR = 0.15  # that of one run; the bench at three sizes is in docs/footprint.md


@pytest.mark.slow
def test_formulas_hold_for_importance_and_distillation(tmp_path: Path) -> None:
    words = ["--stages", "importance", "distill", "--processes", "1", "--sizes", "0", "--keep", str(tmp_path)]
    bench = [sys.executable, str(ROOT / "scripts" / "bench" / "footprint.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(bench, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["stage"] for row in rows] == ["importance", "distill"]
    for row in rows:
        assert not row["failure"] and row["measured"] > 40 * 2**20
        assert abs(row["predicted"] / row["measured"] - 1) < LARGEST_ERROR, row["stage"]
