"""scripts/bench/served_plans.py: the cost model against what vLLM served on one H200."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "served_plans.py"


def test_predictions_of_what_was_served() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["worst_capacity_error"] < 1e-9
    assert found["mean_absolute_error"]["measured kernels"] < 0.11
    assert max(map(abs, found["speed_up_errors"]["measured kernels"])) < 0.03
