"""A hostile input, what must become of it, and the judgement of what became of it."""

import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from faults.commands import End, Run, Server
from faults.damage import Damage, all_of, write
from faults.world import OUT, STAGES, World
from lit_puzzle.environments.episodes import EPISODES_FILE, Request, read_rows

NOTHING: Damage = all_of()
MODULE = """
def nothing(run_dir):
    return {}
"""
VARYING = re.compile(rb'"(seconds": [0-9.e+-]+|library": "[^"]*")')  # times, and where an input was found
PROBE = "command: nothing_module.nothing\nrun_dir: out\n"


@dataclass(frozen=True)
class Refused:
    """Exit code 2 and one message with all of these texts (`a|b`: one of them).

    Args:
        words: the texts.
        keeps: whether results made before may stay in the run folder; else nothing may be left that refuses another
            recipe.
    """

    words: tuple[str, ...]
    keeps: bool = False


@dataclass(frozen=True)
class Right:
    """Exit code 0 and the same result files as another run, by default that of the undamaged inputs.

    Args:
        damage: what is done to the inputs of the other run.
        words: overrides of the other run, in place of the case's.
        only: the results that are compared; none: all of the stage.
    """

    damage: Damage = NOTHING
    words: tuple[str, ...] | None = None
    only: tuple[str, ...] | None = None


Expected = Refused | Right | tuple[Refused | Right, ...]


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Args:
        name: says what is wrong; unique.
        owner: whose part of the project has to stand it.
        stage: a stage of `faults.world.STAGES`, or a recipe file that the damage wrote.
        damage: what is done to the inputs.
        expected: what must happen; of several one of them.
        words: overrides of the command.
        needs: further folders of the world.
        seconds: what a run may take; more is a hang.
        environment: variables of the environment.
        words_are_wrong: whether the corrected command is without `words`.
    """

    name: str
    owner: str
    stage: str
    damage: Damage
    expected: Expected
    words: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    seconds: float = 30.0
    environment: dict[str, str] = field(default_factory=dict)
    words_are_wrong: bool = False


def refused(*words: str, keeps: bool = False) -> Refused:
    """Refused with these texts."""
    return Refused(words, keeps)


class Trials:
    """Runs cases in a folder of their own each, which is removed.

    Args:
        server: runs the commands.
        world: the small world.
        scratch: gets the folders of the trials.
    """

    def __init__(self, server: Server, world: World, scratch: Path) -> None:
        self.server = server
        self.world = world
        self.scratch = scratch
        self.count = 0
        self.expected_results: dict[object, dict[str, bytes]] = {}

    def fault(self, case: Case) -> str | None:
        """Try a case; return what is wrong with the outcome, or None."""
        folder = self.prepared(case.stage, case.needs, case.damage)
        end = self.run(case, folder, case.words)
        expected = case.expected if isinstance(case.expected, tuple) else (case.expected,)
        faults = [self.compared(case, each, end, folder) for each in expected]
        shutil.rmtree(folder)
        return None if None in faults else " / ".join(fault for fault in faults if fault)

    def prepared(self, stage: str, needs: tuple[str, ...], damage: Damage) -> Path:
        """Return a new folder with the inputs of a stage, damaged."""
        self.count += 1
        inputs = STAGES[stage].inputs if stage in STAGES else ()
        folder = self.world.copy(dict.fromkeys((*inputs, *needs)), self.scratch / f"{self.count:04}")
        damage(folder)
        return folder

    def run(self, case: Case, folder: Path, words: tuple[str, ...]) -> End:
        """Run the command of a case in a folder."""
        command = STAGES[case.stage].command(*words) if case.stage in STAGES else ["run", case.stage, *words]
        [end] = self.server.run(
            Run(command, str(folder), f"{folder}.txt", limit_seconds=case.seconds, environment=case.environment)
        )
        return end

    def compared(self, case: Case, expected: Refused | Right, end: End, folder: Path) -> str | None:
        """Return how the outcome of a case differs from what is expected, or None."""
        if end.too_slow:
            return f"HANG: more than {case.seconds} s"
        if end.has_traceback:
            return f"TRACEBACK: {last_line(end.said)}"
        if isinstance(expected, Refused):
            return self.not_refused(case, expected, end, folder)
        if end.status != 0:
            return f"exit code {end.status}, a right result expected: {last_line(end.said)}"
        return self.not_right(case, expected, folder)

    def not_refused(self, case: Case, expected: Refused, end: End, folder: Path) -> str | None:
        """Return what is wrong with a refusal, or None."""
        if end.status == 0:
            return "SILENT: exit code 0"
        if end.status != 2:
            return f"exit code {end.status}, not 2: {last_line(end.said)}"
        message = ("\n" + end.said).rpartition("\nerror: ")[2]
        missing = [word for word in expected.words if not any(part in message for part in word.split("|"))]
        if missing or "error: " not in end.said:
            return f"message without {missing}: {message.strip()[:400]}"
        return None if expected.keeps else self.blocked(case, folder)

    def blocked(self, case: Case, folder: Path) -> str | None:
        """Return how what a refusal left in the run folder refuses the corrected command, or None.

        The corrected command is the same one with the undamaged inputs, and without the case's words if those were
        wrong; where the trial has files of its own, it is another recipe.
        """
        left = sorted(path.relative_to(folder / OUT).as_posix() for path in (folder / OUT).rglob("*") if path.is_file())
        if not (folder / OUT).is_dir() or not left:
            return None
        if case.stage in STAGES and (case.words_are_wrong or not case.words):
            for name in (*STAGES[case.stage].inputs, *case.needs):
                remove_and_copy(self.world.require(name), folder / name)
            command = STAGES[case.stage].command()
        else:
            all_of(write("nothing_module.py", MODULE), write("probe.yaml", PROBE))(folder)
            command = ["run", "probe.yaml"]
        [end] = self.server.run(Run(command, str(folder), f"{folder}.txt"))
        said = last_line(end.said)
        return None if end.status == 0 else f"BLOCKS: the refusal left {left}; the corrected command: {said}"

    def not_right(self, case: Case, expected: Right, folder: Path) -> str | None:
        """Return which result files differ from those of the other run, or None."""
        stage = STAGES[case.stage]
        patterns = stage.results if expected.only is None else expected.only
        words = case.words if expected.words is None else expected.words
        key = (case.stage, words, id(expected.damage), patterns)
        if key not in self.expected_results:
            other = self.prepared(case.stage, case.needs, expected.damage)
            end = self.run(case, other, words)
            assert end.status == 0, f"the run that {case.name} is compared with: {end.said}"
            self.expected_results[key] = results(other / OUT, patterns)
        right, found = self.expected_results[key], results(folder / OUT, patterns)
        differing = sorted(name for name in {*right, *found} if right.get(name) != found.get(name))
        return f"WRONG RESULT: {differing} differ" if differing or not right else None


def remove_and_copy(source: Path, target: Path) -> None:
    """Put a copy of a folder of the world in the place of whatever is there."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    shutil.copytree(source, target)


def results(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Return the result files of a run folder, by name; without what differs from run to run."""
    paths = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): without_varying(path) for path in paths}


def without_varying(path: Path) -> bytes:
    """Return the content of a file; of JSON and of completions without times and without where an input was found."""
    if path.name == EPISODES_FILE:
        return repr([replace(episode, request=Request()) for episode in read_rows(path)]).encode()
    content = path.read_bytes()
    return VARYING.sub(b"", content) if path.suffix in (".json", ".jsonl") else content


def last_line(said: str) -> str:
    """Return the last line that a command printed."""
    return (said.strip().splitlines() or [""])[-1][:300]
