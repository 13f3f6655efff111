r"""graders/math_answers.py and its worker processes: equal mathematics, and answers that would hold a grader up."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_puzzle.environments.graders import worker_pool
from lit_puzzle.environments.graders.math_answers import grade_math, read_math, stated_expression, unreadable
from lit_puzzle.environments.graders.worker_pool import close_workers, run_jobs
from lit_puzzle.environments.verdict import RIGHT, WRONG, Verdict

RIGHT_PAIRS = [
    (r"\sqrt{12}", r"The answer is $2\sqrt{3}$."),
    (r"\frac{\pi}{4}", r"\boxed{\pi/4}"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    ("[1,2)", r"\boxed{[1,2)}"),
    (r"(-\infty,2)\cup(3,\infty)", r"\boxed{(3,\infty)\cup(-\infty,2)}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"\frac{1}{2}", "0.5"),
    ("10", r"\boxed{\binom{5}{2}}"),
    ("120", r"\boxed{5!}"),
    (r"\sqrt{2}", r"\boxed{1.41421356}"),
    (r"\text{even}", r"\boxed{\text{Even}}"),
    ("50\\%", r"\boxed{\frac{1}{2}}"),
    ("(1,2)", "Answer: (1, 2)"),
    ("1, 2", r"\boxed{1,2}"),
    ("1, 2", "1 and 2"),
    ("1, 2", r"\boxed{(1, 2)}"),
    ("x=1, x=2", r"\boxed{1, 2}"),
    (r"\sqrt{2}, -3", r"\boxed{x_1 = \sqrt{2},\ x_2 = -3}"),
    (r"\{1,2\}", r"\boxed{2, 1}"),
    ("1,000", "**1000**"),
    ("1+2i", r"$$\boxed{2i+1}$$"),
]
WRONG_PAIRS = [
    (r"\sqrt{2}", "2"),
    ("10^{5}", "5"),
    ("12:30", "30"),
    (r"\frac{\pi}{4}", "4"),
    (r"\sqrt{2}", r"\boxed{1.41}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    ("[1,2)", r"\boxed{(1,2]}"),
    ("1,2", "2,1"),
    ("1, 2", r"\boxed{2, 1}"),
    ("1, 2", r"\boxed{1, 2, 3}"),
    ("1, 2", r"\boxed{1}"),
    ("2,3,5", r"\boxed{5, 3, 2}"),
    ("12", "at least 12"),
    ("1", r"\boxed{1 \text{ or } 2}"),
    ("1", r"\boxed{x=1,x=2}"),
    ("1", r"\boxed{\{1,2\}}"),
    ("2", r"\boxed{2\pi}"),
    ("5", r"\boxed{5} or $\boxed{6}$"),
    ("x+1", r"\boxed{x+2}"),
]


def test_equal_and_different_mathematics() -> None:
    pairs = RIGHT_PAIRS + WRONG_PAIRS
    golds = [read_math(gold, "file:1") for gold, _ in pairs]
    verdicts = grade_math([final for _, final in pairs], golds)
    wrong = [pair for pair, verdict in zip(pairs, verdicts) if verdict.correct != float(pair in RIGHT_PAIRS)]
    assert wrong == []
    assert not any(verdict.failed for verdict in verdicts)


def test_a_text_without_an_answer_is_unclear() -> None:
    long = "First we look at the graph.\nThen we think.\nIt is either of the two."
    assert grade_math([long, ""], [r"\sqrt{2}", "3"]) == [Verdict(0.0, "unclear answer")] * 2


HOSTILE = [
    r"\boxed{10^{10^{10}}}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{\prod_{i=1}^{99999999} i}",
    r"\boxed{\sum_{n=1}^{10^9} n^{n}}",
    r"\boxed{" + "(" * 5000 + ")" * 5000 + "}",
    r"\boxed{" + r"\frac{" * 300 + "1" + "}" * 300 + "}",
    r"\boxed{4}$ or $\boxed{5",
    "$" + "x^" * 400 + "x$",
    r"\boxed{__import__('os').system('touch TARGET')}",
    r"\boxed{\text{__import__('os').system('touch TARGET')}}",
    "The answer is __import__('os').system('touch TARGET')",
    r"$\operatorname{eval}(\text{open('TARGET','w')})$",
    r"$\mathrm{lambda: open('TARGET','w')}()$",
]


@pytest.mark.slow
def test_hostile_answers_are_never_right_and_never_hold_the_grader_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "written"
    monkeypatch.setattr(worker_pool, "SECONDS", 1.0)
    finals = [final.replace("TARGET", str(target)) for final in HOSTILE] + [r"\boxed{\sqrt{18}}"]
    begun = time.monotonic()
    verdicts = grade_math(finals, [r"3\sqrt{2}"] * len(finals))
    assert time.monotonic() - begun < 10 * len(finals)
    assert [verdict.correct for verdict in verdicts] == [0.0] * len(HOSTILE) + [1.0]
    assert not target.exists()
    assert any("no verdict within" in verdict.reason for verdict in verdicts)


def test_a_worker_that_has_died_meanwhile_is_replaced() -> None:
    close_workers()
    jobs = [{"kind": "symbolic", "gold": r"\sqrt{12}", "answer": rf"2\sqrt{{{number}}}"} for number in (3, 4)]
    run_jobs(jobs)  # workers are there
    for worker in worker_pool._idle[os.getpid()]:
        worker._process.kill()
        worker._process.wait()
    assert [reply["correct"] for reply in run_jobs(jobs)] == [True, False]


def test_a_worker_that_dies_at_its_job_fails_only_that_job() -> None:
    jobs: list[dict[str, object]] = [
        {"kind": "symbolic", "gold": r"\sqrt{12}", "answer": r"2\sqrt{3}"},
        {"kind": "no such kind"},  # the process ends with a KeyError
        {"kind": "symbolic", "gold": r"\sqrt{12}", "answer": r"2\sqrt{5}"},
    ]
    replies = run_jobs(jobs)
    assert [reply.get("correct") for reply in replies] == [True, None, False]
    assert replies[1] == {"failed": "its process ended with 1"}


def test_workers_end_with_the_process(tmp_path: Path) -> None:
    code = (
        "from lit_puzzle.environments.graders.worker_pool import run_jobs, _idle\n"
        "import os\n"
        "run_jobs([{'kind': 'symbolic', 'gold': '1', 'answer': '1'}])\n"
        "print(_idle[os.getpid()][0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    worker = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and _state(worker) != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists() or _state(worker) == "Z"


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("gold", ["", "(" * 50 + ")" * 50, "{", "x" * 1001, "a $ b"])
def test_gold_answers_that_cannot_be_read_are_refused_by_their_place(gold: str) -> None:
    with pytest.raises(ValueError, match="file:7: math verification cannot read the answer"):
        read_math(gold, "file:7")


def test_what_is_said_to_be_the_answer_is_the_expression() -> None:
    assert stated_expression(r"So $x=1$ and $y=2$. The answer is $x+y$.") == "x+y"
    assert stated_expression("\\[\n\\boxed{ \\frac{a}{b} }\n\\]") == r"\frac{a}{b}"
    assert unreadable(r"\frac{a}{b}") == ""
    assert (Verdict(1.0, "right"), Verdict(0.0, "wrong")) == (RIGHT, WRONG)
