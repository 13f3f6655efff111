"""A stage's process: what is shown of its log, its exit code, its CPU time, what it leaves running."""

import time
from pathlib import Path

import pytest

from lit_puzzle.pipeline.process import last_lines, run_process


def test_an_error_is_shown_from_its_first_line_without_escapes(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("error: of an earlier attempt\n")
    begin = log.stat().st_size
    log.open("a").write("\x1b[31mplan: 1\x1b[0m\r\n50%\r100%\n\nerror: no\n  because\n")
    assert last_lines(log, begin) == ["error: no", "  because"]
    log.open("a").write("".join(f"line {i}\n" for i in range(100)))
    assert last_lines(log, log.stat().st_size - 100)[-1] == "line 99"
    (tmp_path / "y.log").write_text("a\rb\nTraceback\n  c\n")
    assert last_lines(tmp_path / "y.log") == ["a", "b", "Traceback", "  c"]


def test_an_exit_code_and_the_log_are_kept(tmp_path: Path) -> None:
    ticks: list[float] = []
    log = tmp_path / "x.log"
    ended = run_process(["run", "recipes/nothing.yaml"], log, ticks.append)
    assert ended.code == 2 and ended.last_lines[0].startswith("error: There is no recipe 'recipes/nothing.yaml'")
    assert ended.cpu_seconds > 0 and ticks and log.read_text().startswith("$ lightning run recipes/nothing.yaml\n")


def test_another_lit_puzzle_in_the_current_folder_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lit_puzzle").mkdir()
    (tmp_path / "lit_puzzle" / "__init__.py").touch()
    (tmp_path / "lit_puzzle" / "__main__.py").write_text("print('another')\n")
    monkeypatch.chdir(tmp_path)
    ended = run_process(["recipes"], tmp_path / "x.log", lambda seconds: None)
    assert ended.code == 0 and "recipes/importance.yaml" in (tmp_path / "x.log").read_text()


def test_what_a_stage_leaves_running_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving.py").write_text(
        "import subprocess, sys\n"
        "def leave(run_dir):\n"
        "    code = 'import time; time.sleep(600)'\n"
        "    left = subprocess.Popen([sys.executable, '-c', code])\n"
        "    (run_dir / 'left.txt').write_text(str(left.pid))\n"
        "    return {}\n"
    )
    (tmp_path / "leave.yaml").write_text("command: leaving.leave\nrun_dir: run\n")
    monkeypatch.chdir(tmp_path)
    assert run_process(["run", "leave.yaml"], tmp_path / "x.log", lambda seconds: None).code == 0
    stat = Path("/proc", (tmp_path / "run" / "left.txt").read_text(), "stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
