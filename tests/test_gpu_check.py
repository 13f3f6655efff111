"""scripts/gpu_check.sh: one part's failure, hanging or missing package hides no other; every part runs on a CPU."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
PARTS = ["attention", "layer", "expert_importance", "distill", "mxfp4", "cost_model", "rl", "fp8_kv", "rollouts"]
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from part import Options, Row, Skipped, run
{before}
def work(options):
    yield {{"value": 1.5, "ok": {right}}}
{after}
run(work)
"""


@pytest.fixture
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_parts", SCRIPTS / "gpu_check" / "run_parts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: dict[str, str], seconds: float = 60
) -> dict[str, Any]:
    text = SCRIPT.format(folder=str(SCRIPTS / "gpu_check"), **{"before": "", "after": "", "right": "True"} | script)
    (tmp_path / "one.py").write_text(text)
    monkeypatch.setattr(runner, "HERE", tmp_path)
    result = runner.run_part("one", argparse.Namespace(out=tmp_path, device="cpu", small=True), seconds)
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        ({}, "ok", ""),
        ({"right": "False"}, "wrong", ""),
        ({"after": "    raise RuntimeError('no kernel image')"}, "failed", "RuntimeError: no kernel image"),
        ({"after": "    raise Skipped('no card')"}, "skipped", "no card"),
        ({"after": "    import os; os.kill(os.getpid(), 9)"}, "failed", "exit -9"),
    ],
)
@pytest.mark.slow
def test_how_a_part_ends(
    runner: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: dict[str, str],
    status: str,
    reason: str,
) -> None:
    result = run(runner, tmp_path, monkeypatch, script)
    assert result["status"] == status
    assert reason in result.get("reason", "")
    assert result["rows"][0]["value"] == 1.5  # what it had is kept


@pytest.mark.slow
def test_a_missing_package_is_named_and_our_own_is_a_failure(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(runner, tmp_path, monkeypatch, {"before": "import nonesuch"})
    assert (result["status"], result["reason"]) == ("skipped", "nonesuch is not installed")
    result = run(runner, tmp_path, monkeypatch, {"before": "import lit_puzzle.nonesuch"})
    assert result["status"] == "failed"


@pytest.mark.slow
def test_a_part_that_hangs_is_killed_with_what_it_started(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = "    import os, subprocess; child = subprocess.Popen(['sleep', '600']); "
    hang += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); child.wait()"
    result = run(runner, tmp_path, monkeypatch, {"after": hang}, seconds=30)
    assert result["status"] == "timed out" and result["rows"][0]["value"] == 1.5
    state = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # dead, where nobody collects the orphans too


def test_the_limits_fit_in_ten_minutes(runner: ModuleType) -> None:
    assert sorted(runner.DEFAULT) == sorted(PARTS) and set(runner.LIMITS) - set(PARTS) == {*runner.ASKED_FOR}
    assert sum(runner.LIMITS[name] for name in PARTS) <= runner.TOTAL_SECONDS == 8 * 60
    assert all((SCRIPTS / "gpu_check" / f"{name}.py").is_file() for name in runner.LIMITS)


@pytest.mark.parametrize("part", [*PARTS, "serving"])
@pytest.mark.slow
def test_every_part_runs_on_a_cpu(part: str, tmp_path: Path) -> None:
    """`fp8_kv`, `rollouts` and `serving` where vLLM is at hand, else they say what is missing."""
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), "--device", "cpu", "--small", "--parts", part]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    report = json.loads((tmp_path / "report.json").read_text())["parts"][part]
    assert done.returncode == 0, (report, (tmp_path / f"{part}.log").read_text()[-3000:])
    assert report["status"] == "ok" or (part in ("fp8_kv", "rollouts", "serving") and report["status"] == "skipped")
    assert f"{part}: {report['status']}" in done.stdout
