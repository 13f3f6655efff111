"""Bench: verdicts per second of unit tests in the sandbox, and of mathematics in worker processes.

    python scripts/bench/sandbox.py [--programs 48] [--runs 3]

    one test        a program with one test: the start of a sandbox and of a process
    ten tests       the same with ten tests: a start, and ten processes
    wrong           a program that fails its first of ten tests
    endless         a program that never ends, with a limit of half a second of CPU time
    expressions     comparisons by math-verify that no fast path decides
    numbers         the fast path

Verdicts per wall-clock second with all cores at work, and CPU-milliseconds of this process and its workers; then the
CPU-milliseconds of a sandbox, read from the kernel's tables before it ends, one sandbox after the other. Medians over
runs. Needs the extras `sandbox` and `graders`. Ends with one JSON line.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from lit_puzzle.environments.graders.code_tests import UnitTests, grade_programs
from lit_puzzle.environments.graders.math_answers import grade_math
from lit_puzzle.environments.graders.worker_pool import close_workers, cores
from lit_puzzle.environments.sandbox import check_sandbox, run_program
from lit_puzzle.environments.sandbox_limits import SandboxLimits
from lit_puzzle.environments.verdict import Verdict

ADD = "print(sum(map(int, input().split())))"


def tests_of(count: int) -> UnitTests:
    """Return tests of sums of two numbers."""
    return UnitTests(tuple(f"{n} 1\n" for n in range(count)), tuple(f"{n + 1}\n" for n in range(count)))


def workloads(programs: int) -> dict[str, Callable[[], list[Verdict]]]:
    """Return what is measured, by name."""
    limits, short = SandboxLimits(), SandboxLimits(cpu_seconds=1, wall_seconds=0.5)
    few = max(2, programs // 8)

    def code(source: str, tests: UnitTests, limits: SandboxLimits, count: int) -> list[Verdict]:
        return grade_programs([source] * count, [tests] * count, limits)

    return {
        "one test": lambda: code(ADD, tests_of(1), limits, programs),
        "ten tests": lambda: code(ADD, tests_of(10), limits, programs),
        "wrong": lambda: code("print(0)", tests_of(10), limits, programs),
        "endless": lambda: code("while True: pass", tests_of(10), short, few),
        "expressions": lambda: grade_math(
            [rf"\boxed{{2\sqrt{{{n}}}}}" for n in range(programs)], [r"\sqrt{12}"] * programs
        ),
        "numbers": lambda: grade_math([rf"\boxed{{{n}}}" for n in range(programs)], ["3"] * programs),
    }


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has started and that have ended."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def sandbox_cpu_seconds(count: int) -> float:
    """Return the CPU time of one sandbox and all in it, up to the end of its last test."""
    tests = tests_of(count)
    run = run_program(ADD, tests.inputs, SandboxLimits())
    assert all(next(run).status == "ok" for _ in tests.inputs)
    used = tree_cpu_seconds(os.getpid())
    run.close()
    return used


def tree_cpu_seconds(process: int) -> float:
    """Return the CPU time of the processes below one, ended ones that they have waited for included."""
    total, level = 0.0, [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    while level:
        number = level.pop()
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        level += map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split())
    return total


def measure(work: Callable[[], list[Verdict]]) -> tuple[int, float, float]:
    """Return verdicts, wall-clock seconds and CPU-seconds of one run, the end of its workers included."""
    begun, used = time.perf_counter(), cpu_seconds()
    verdicts = work()
    wall = time.perf_counter() - begun
    close_workers()
    assert not any(verdict.failed for verdict in verdicts)
    return len(verdicts), wall, cpu_seconds() - used


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    check_sandbox()
    print(f"{cores()} cores, uid {os.getuid()}, load {os.getloadavg()[0]:.1f}")
    results: dict[str, dict[str, float]] = {}
    for name, work in workloads(arguments.programs).items():
        runs = [measure(work) for _ in range(arguments.runs)]
        count = runs[0][0]
        wall, cpu = (statistics.median(run[column] for run in runs) for column in (1, 2))
        results[name] = {"per_second": count / wall, "cpu_ms": 1000 * cpu / count}
        print(f"{name:<12} {count / wall:8.1f} verdicts a second   {1000 * cpu / count:8.1f} CPU-ms a verdict")
    for tests in (1, 10):
        cpu = statistics.mean(sandbox_cpu_seconds(tests) for _ in range(arguments.programs))
        results[f"sandbox of {tests}"] = {"cpu_ms": 1000 * cpu}
        print(f"a sandbox with {tests} tests: {1000 * cpu:.1f} CPU-ms in it")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
