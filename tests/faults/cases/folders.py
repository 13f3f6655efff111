"""Run folders that are not ours, not writable, or in another state than they seem."""

import os
from pathlib import Path

from faults.case import NOTHING, Case, Expected, Right, refused
from faults.damage import Damage, all_of, copy, link, remove, replace, write
from faults.world import OUT

FOREIGN = all_of(
    write(f"{OUT}/config.yaml", "name: my project\n"),
    write(f"{OUT}/.git/HEAD", "ref: refs/heads/main\n"),
    write(f"{OUT}/work.py", "x = 1\n"),
)


def case(name: str, damage: Damage, expected: Expected, *words: str, stage: str = "library") -> Case:
    """Return a case of a run folder."""
    return Case(f"run folder: {name}", "folders", stage, damage, expected, words, ("runs/library",))


def no_config(folder: Path) -> None:
    """Leave the run folder as a process leaves it that is killed right after it made it."""
    (folder / OUT).mkdir()


def read_only(folder: Path) -> None:
    """Make the place of the run folder read-only; the superuser writes anywhere, so a full device stands in."""
    (folder / "closed").mkdir()
    (folder / "closed").chmod(0o555)


KEEPS = refused(OUT, keeps=True)
AS_ROOT = os.geteuid() == 0
CASES = [
    *(
        case(f"marker: {name}", write(f"{OUT}/.lit_puzzle_run", content), refused(".lit_puzzle_run", said, keeps=True))
        for name, content, said in (
            ("empty", "", "choose another --run_dir"),
            ("a list", "[]", "choose another --run_dir"),
            ("files are a number", '{"format": 1, "files": 3}', "files must be a list"),
            ("files are missing", '{"format": 1}', "files must be a list"),
            ("of a later version", '{"format": 99, "version": "9.0", "files": []}', "version 9.0"),
            ("nested 100,000 deep", '{"files": ' + "[" * 100_000, "nested too deeply"),
        )
    ),
    case("a link to itself", link(OUT, OUT), refused(OUT, keeps=True)),
    case("foreign, with a config.yaml", FOREIGN, KEEPS),
    case("foreign, with a config.yaml, --overwrite", FOREIGN, KEEPS, "--overwrite"),
    case(
        "foreign, with a config.yaml and a run.json, --overwrite",
        all_of(FOREIGN, write(f"{OUT}/run.json", "{}")),
        KEEPS,
        "--overwrite",
    ),
    case("foreign files", write(f"{OUT}/notes.txt", "x"), KEEPS),
    case("foreign files, --overwrite", write(f"{OUT}/notes.txt", "x"), KEEPS, "--overwrite"),
    case("a complete run", copy("runs/library", OUT), KEEPS),
    case(
        "a complete run of this tool with a file of the user's, --overwrite",
        all_of(copy("runs/library", OUT), write(f"{OUT}/thesis.txt", "x")),
        (refused("thesis.txt", keeps=True), refused(OUT, keeps=True)),
        "--overwrite",
    ),
    case(
        "a run inside, --overwrite",
        all_of(copy("runs/library", OUT), copy("runs/importance", f"{OUT}/inside")),
        KEEPS,
        "--overwrite",
    ),
    case(
        "the inputs inside, --overwrite",
        all_of(copy("runs/library", OUT), copy("runs/importance", f"{OUT}/importance")),
        KEEPS,
        "--overwrite",
        f"--importance={OUT}/importance",
    ),
    case("the current folder", NOTHING, refused(".", keeps=True), "--run_dir=."),
    case("the current folder, --overwrite", NOTHING, refused(".", keeps=True), "--run_dir=.", "--overwrite"),
    case("the parent's folder", NOTHING, refused("parent", keeps=True), "--run_dir=parent"),
    case("the parent's folder, --overwrite", NOTHING, refused("parent", keeps=True), "--run_dir=parent", "--overwrite"),
    case("a file in its place", write(OUT, "x"), KEEPS),
    case("a file in its place, --overwrite", write(OUT, "x"), KEEPS, "--overwrite"),
    case("a file in the place of its parent", write("a", "x"), refused("a/b"), "--run_dir=a/b"),
    case("a link to nowhere", link(OUT, "gone"), (Right(), KEEPS)),
    case("not allowed to be made", NOTHING, refused("/proc/nowhere"), "--run_dir=/proc/nowhere"),
    case("a name of 300 letters", NOTHING, refused("n" * 50), f"--run_dir={'n' * 300}"),
    case("an empty name", NOTHING, refused("run_dir"), "--run_dir="),
    case("empty, as a kill after mkdir leaves it", no_config, Right()),
    case("config.yaml of no bytes", write(f"{OUT}/config.yaml", ""), (Right(), KEEPS)),
    case(
        "config.yaml that is cut",
        all_of(copy("runs/library", OUT), remove(f"{OUT}/run.json"), write(f"{OUT}/config.yaml", "command: libr")),
        KEEPS,
    ),
    case(
        "started by another recipe, with results",
        all_of(copy("runs/library", OUT), remove(f"{OUT}/run.json"), replace(f"{OUT}/config.yaml", "- 8", "- 12")),
        KEEPS,
    ),
    case("temporary files of a dead process", all_of(no_config, write(f"{OUT}/.config.yaml.999999", "half")), Right()),
    *(
        Case(
            f"run folder: read-only: {stage}", "folders", stage, read_only, refused("closed"), ("--run_dir=closed/out",)
        )
        for stage in ("library", "generate", "rl_recover")
        if not AS_ROOT
    ),
    Case(
        "run folder: not allowed to be made: rl_recover",
        "folders",
        "rl_recover",
        NOTHING,
        refused("/proc/nowhere"),
        ("--run_dir=/proc/nowhere",),
    ),
    Case("run folder: a file in its place: importance", "folders", "importance", write(OUT, "x"), KEEPS),
    Case(
        "input: a secret of the environment",
        "folders",
        "evaluate",
        NOTHING,
        Right(words=()),
        ("--checkpoint=${oc.env:FOLDER_OF_CHILD}",),
        environment={"FOLDER_OF_CHILD": "child"},
    ),
    Case(
        "input: an incomplete run",
        "folders",
        "library",
        remove("runs/importance/run.json"),
        refused("runs/importance", "complete"),
    ),
    Case(
        "input: a run.json that is cut",
        "folders",
        "library",
        write("runs/importance/run.json", "{"),
        (Right(), refused("run.json")),
    ),
]
