"""Pipelines as processes: in order, resumed after kills, skipped where complete, stopped where a stage fails."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import helpers.pipeline_stages
import pytest
import yaml

from lit_puzzle.run.folder import is_complete

STAGES = ("first", "second", "third")


class Pipeline:
    """A pipeline of three cheap stages in a folder: `second` reads `first`, `third` reads both."""

    def __init__(self, folder: Path, **second: Any) -> None:
        self.folder, self.run = folder, folder / "runs" / "all"
        shutil.copy(helpers.pipeline_stages.__file__, folder / "cheap_stages.py")
        reads = {"second": ["runs/first"], "third": ["runs/first", "runs/second"]}
        for name in STAGES:
            recipe = {"command": "cheap_stages.write", "run_dir": f"runs/{name}", "text": name[0]}
            self.write(f"{name}.yaml", recipe | ({"reads": reads[name]} if name in reads else {}))
        entries = [{"recipe": f"{name}.yaml"} for name in STAGES]
        self.write("all.yaml", {"command": "pipeline", "run_dir": "runs/all", "stages": entries})
        self.change("second", **second)

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(yaml.safe_dump(content))

    def change(self, name: str, **keys: Any) -> None:
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lit_puzzle", "run", "all.yaml", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def __call__(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=900)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def result(self) -> str:
        return (self.run / "third" / "out.txt").read_text()

    def wait_for_steps(self, count: int) -> int:
        """Wait until the second stage has done some steps; returns its process."""
        file, deadline = self.run / "second" / "steps.txt", time.monotonic() + 900
        while not file.is_file() or len(file.read_text().splitlines()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return int((self.run / "second" / "pid.csv").read_text())


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def ended(pid: int, seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def states(out: str) -> dict[str, str]:
    """What the last line about each stage says, without times."""
    lines = [line.split("] ", 1)[1].split(": ", 1) for line in out.splitlines() if line.startswith("[")]
    return {name: text.split(" after ")[0] for name, text in lines}


def test_stages_run_in_order_into_one_folder_and_complete_ones_stay(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    code, out, err = pipeline()
    assert code == 0 and pipeline.result() == "ffst", err
    assert [line.split("] ")[1].split(":")[0] for line in out.splitlines() if "starts" in line] == list(STAGES)
    record = json.loads((pipeline.run / "run.json").read_text())["results"]
    assert record["stages"] == 3 and record["cpu_seconds/second"] > 0
    times = {name: (pipeline.run / name / "run.json").stat().st_mtime_ns for name in STAGES}
    code, out, _ = pipeline()
    assert code == 0 and states(out) == dict.fromkeys(STAGES, "complete") and "starts" not in out
    assert times == {name: (pipeline.run / name / "run.json").stat().st_mtime_ns for name in STAGES}
    assert is_complete(pipeline.run)


def test_what_a_stage_prints_is_shown_if_wished_and_again_when_it_is_complete(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    entries = [{"recipe": f"{name}.yaml", "print_output": name == "second"} for name in STAGES]
    pipeline.write("all.yaml", {"command": "pipeline", "run_dir": "runs/all", "stages": entries})
    for complete in ("complete after", "complete\n"):
        code, out, err = pipeline()
        assert code == 0 and f"[2/3] second: {complete}" in out, err
        assert out.count("wrote 's'") == 1 and "wrote 'f'" not in out
    (pipeline.run / "second.log").unlink()
    code, out, err = pipeline()
    assert code == 0 and "wrote" not in out, err


def test_a_stage_completed_by_its_own_command_does_not_show_the_attempt_that_failed(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, fails=True)
    entries = [{"recipe": f"{name}.yaml", "print_output": True} for name in STAGES]
    pipeline.write("all.yaml", {"command": "pipeline", "run_dir": "runs/all", "stages": entries})
    code, _, err = pipeline()
    assert code == 2
    (tmp_path / "mended").touch()
    alone = err.split("This stage alone: lightning ")[1].splitlines()[0]
    subprocess.run([sys.executable, "-m", "lit_puzzle", *shlex.split(alone)], cwd=tmp_path, check=True)
    code, out, err = pipeline()
    assert code == 0 and "[2/3] second: complete\n" in out, err
    assert "refuses" not in out and "wrote 'f'" in out


def test_a_failing_stage_ends_the_pipeline_with_its_error_and_the_command(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, fails=True)
    code, out, err = pipeline()
    assert code == 2 and not (pipeline.run / "third").exists() and not is_complete(pipeline.run)
    assert "[2/3] second: failed with exit code 2" in err and "error: this stage refuses: 3 is too many" in err
    assert "This stage alone: lightning run second.yaml --run_dir=runs/all/second" in err
    assert err.rstrip().endswith("To resume the pipeline: lightning run all.yaml")
    assert "something to say" in (pipeline.run / "second.log").read_text()
    pipeline.change("second", fails=False)
    code, out, err = pipeline("--overrides.third.text=T")
    assert code == 0 and states(out) == dict.fromkeys(STAGES, "complete"), err
    assert "text: T" in (pipeline.run / "config.yaml").read_text()
    assert "[1/3] first: complete\n" in out and "[2/3] second: starts" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_stage_and_the_same_command_resumes(tmp_path: Path, number: signal.Signals) -> None:
    pipeline = Pipeline(tmp_path, steps=40)
    process = pipeline.start()
    pid = pipeline.wait_for_steps(3)
    process.send_signal(number)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 128 + number and f"stopped by {number.name}: the same command continues" in err
    assert not is_alive(pid) and not is_complete(pipeline.run / "second")
    code, out, err = pipeline()
    assert code == 0 and "[1/3] first: complete\n" in out and "[2/3] second: is resumed" in out, err
    rows = [line.split() for line in (pipeline.run / "second" / "steps.txt").read_text().splitlines()]
    assert [int(step) for step, _ in rows] == list(range(40)) and len({pid for _, pid in rows}) == 2
    assert json.loads((pipeline.run / "pipeline.json").read_text())["stages"]["second"]["attempts"] == 1


def test_a_killed_pipeline_leaves_no_stage_at_work_and_resumes(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, steps=40)
    process = pipeline.start()
    pid = pipeline.wait_for_steps(3)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=900)
    assert ended(pid)
    code, out, err = pipeline()
    assert code == 0 and "[2/3] second: is resumed" in out and pipeline.result() == "ffst", err


def test_a_stage_that_is_killed_ends_the_pipeline(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, steps=40)
    process = pipeline.start()
    os.kill(pipeline.wait_for_steps(3), signal.SIGKILL)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 137 and "[2/3] second: failed with exit code 137" in err


def test_a_second_pipeline_in_the_same_folder_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, steps=100)
    process = pipeline.start()
    pipeline.wait_for_steps(1)
    code, _, err = pipeline()
    assert code == 2 and "runs/all is in use by process" in err
    process.terminate()
    process.communicate(timeout=900)


def test_a_changed_key_is_refused_and_made_anew_on_request_with_what_reads_it(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    assert pipeline()[0] == 0
    pipeline.change("second", text="S")
    config = (pipeline.run / "config.yaml").read_text()
    code, out, err = pipeline("--overrides.third.text=T")
    assert code == 2 and "second: keys have changed since: text: s -> S" in err and "--remake=true" in err
    assert "starts" not in out and is_complete(pipeline.run)
    assert (pipeline.run / "config.yaml").read_text() == config
    code, out, err = pipeline("--remake=true")
    assert code == 0 and pipeline.result() == "ffSt", err
    assert "[1/3] first: complete\n" in out and "[3/3] third: is made anew: 1 (second) was made anew since" in out


def test_a_key_changed_while_a_stage_was_interrupted_is_refused_before_anything_runs(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, steps=40)
    process = pipeline.start()
    pipeline.wait_for_steps(3)
    process.terminate()
    process.communicate(timeout=900)
    pipeline.change("second", text="S")
    code, out, err = pipeline()
    assert code == 2 and "second: keys have changed since: text: s -> S" in err and "--remake=true" in err and not out
    code, out, err = pipeline("--remake=true")
    assert code == 0 and "[2/3] second: is made anew" in out and pipeline.result() == "ffSt", err


def test_an_upstream_made_anew_outside_of_the_pipeline_is_noticed(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    assert pipeline()[0] == 0
    alone = [sys.executable, "-m", "lit_puzzle", "run", "first.yaml", "--run_dir=runs/all/first", "--overwrite"]
    subprocess.run([*alone, "--text=f"], cwd=tmp_path, check=True, capture_output=True)
    code, _, err = pipeline()
    assert code == 2 and "first: it was made again by another command" in err  # without the pipeline's date
    subprocess.run([*alone, "--text=F"], cwd=tmp_path, check=True, capture_output=True)
    code, _, err = pipeline()
    assert code == 2 and "second: 0 (first) was made anew since: files" in err
    assert pipeline("--remake=true")[0] == 0 and pipeline.result() == "ffst"


def test_without_recorded_content_the_recorded_ends_decide_and_no_times_of_files(tmp_path: Path) -> None:
    """As after `cp -r`, git or rsync without -t: files have other times, in another order."""
    pipeline = Pipeline(tmp_path)
    pipeline.change("first", records=False)
    assert pipeline()[0] == 0
    for age, name in enumerate(STAGES):
        for path in (pipeline.run / name).iterdir():
            os.utime(path, (2_000_000_000 - age, 2_000_000_000 - age))  # the first stage's are the newest
    code, out, err = pipeline()
    assert code == 0 and states(out) == dict.fromkeys(STAGES, "complete") and "starts" not in out, err
    file = pipeline.run / "first" / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"ended": "2999-01-01T00:00:00.000000+00:00"}))
    code, _, err = pipeline()
    assert code == 2 and "second: 0 (first) was made anew since: first ended after this stage" in err
    file.write_text(json.dumps(record | {"ended": "2999-01-01T00:00:00"}))  # without a zone
    assert "first ended after this stage" in pipeline()[2]
    file.write_text(json.dumps({key: value for key, value in record.items() if key != "ended"}))
    code, _, err = pipeline()
    assert code == 2 and "first/run.json does not say when the run ended (`ended` is '')" in err


def test_overwrite_makes_everything_anew_and_spares_files_of_others(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    assert pipeline()[0] == 0
    (pipeline.run / "mine.txt").write_text("")
    code, _, err = pipeline("--overwrite")
    assert code == 2 and "contains mine.txt, which no stage has made" in err and is_complete(pipeline.run / "third")
    (pipeline.run / "mine.txt").unlink()
    code, out, _ = pipeline("--overwrite")
    assert code == 0 and out.count("starts") == 3


def test_a_folder_of_somebody_else_or_of_another_command_is_refused(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    pipeline.run.mkdir(parents=True)
    (pipeline.run / "thesis.txt").write_text("")
    code, _, err = pipeline()
    assert code == 2 and "is not empty and not a run folder" in err
    (pipeline.run / "thesis.txt").unlink()
    alone = [sys.executable, "-m", "lit_puzzle", "run", "first.yaml"]
    subprocess.run(alone, cwd=tmp_path, check=True, capture_output=True)
    code, _, err = pipeline("--run_dir=runs/first")
    assert code == 2 and "runs/first holds a run of 'cheap_stages.write', not a pipeline" in err


def test_a_folder_of_a_stage_that_this_pipeline_has_not_made_is_refused(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, fails=True)
    assert pipeline()[0] == 2
    (pipeline.run / "third").mkdir()
    (pipeline.run / "third" / "thesis.txt").write_text("")
    code, out, err = pipeline()
    assert code == 2 and "third is not empty and no run folder" in err and "starts" not in out
    (pipeline.run / "third" / "thesis.txt").unlink()
    alone = [sys.executable, "-m", "lit_puzzle", "run", "first.yaml", "--run_dir=runs/all/third"]
    subprocess.run(alone, cwd=tmp_path, check=True, capture_output=True)
    code, out, err = pipeline()
    assert code == 2 and "third: it was not made by this pipeline" in err and "starts" not in out


def test_a_moved_folder_goes_on(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, fails=True)
    assert pipeline()[0] == 2
    (tmp_path / "runs" / "all").rename(tmp_path / "runs" / "moved")
    pipeline.change("second", fails=False)
    code, out, err = pipeline("--run_dir=runs/moved")
    assert code == 0 and "[1/3] first: complete\n" in out, err
    assert pipeline("--run_dir=runs/moved")[0] == 0
