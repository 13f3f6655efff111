"""Commands that only print end quietly where their reader has gone; runs do not count as such."""

import subprocess
import sys

import pytest

from lit_puzzle.run.closed_pipe import only_prints

PLAN = ["run", "recipes/gpt_oss_20b/distill.yaml", "--plan"]


@pytest.mark.parametrize("words", [PLAN, [*PLAN, "--json"], ["recipes"], ["run", "--help"]])
def test_a_reader_that_is_gone_is_no_traceback(words: list[str]) -> None:
    command = [sys.executable, "-m", "lit_puzzle", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stderr is not None
        started.stdout.close()
        said = started.stderr.read()
    assert (said, started.returncode) == ("", 1)


def test_what_only_prints() -> None:
    assert only_prints(PLAN) and only_prints(["show", "runs/search"]) and only_prints([])
    assert only_prints(["run", "recipes/distill.yaml", "--model.help=a.B"])
    assert not only_prints(["run", "recipes/distill.yaml", "--trainer.max_steps=1"])
