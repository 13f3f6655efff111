"""The rooms form one stair: a room imports only from rooms before it in `ROOMS`, and no files form a circle.

The tests mirror the rooms: `tests/ROOM/test_X.py` tests `lit_puzzle/ROOM/X.py`. Tests of a whole stage, a script or a
property of several files have names of their own; tests of the whole package lie at the top.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "lit_puzzle"
ROOMS = (  # the ground floor first; `spec` and `cli` are files, all others folders
    *("run", "spec", "model", "environments", "generation", "training", "data", "costs", "kv_cache", "importance"),
    *(
        "evaluate",
        "library",
        "child",
        "scoring",
        "search",
        "distill",
        "rl",
        "serve",
        "tiny",
        "callbacks",
        "report",
        "footprint",
        "pipeline",
        "cli",
    ),
)
BESIDE_ROOMS = {"faults", "docs", "helpers"}  # folders of tests that mirror no room
ENTRY = ("__init__", "__main__")  # of the package; they stand outside the door


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file, the callbacks through their link and the shipped models left out."""
    files = [path for room in ROOMS for path in sorted((PACKAGE / room).glob("**/*.py"))] + sorted(PACKAGE.glob("*.py"))
    names = {file: file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imported(text: str, known: set[str]) -> set[str]:
    """Modules of the package that a source text imports anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    inside = {name.removeprefix("lit_puzzle.") for name in found if name.startswith("lit_puzzle.")}
    return inside & known


def upstairs(importer: str, targets: set[str]) -> list[str]:
    """Imports that lead to a room above the importer's own."""
    own = ROOMS.index(importer.split(".")[0])
    return [f"{importer} imports {name}" for name in sorted(targets) if ROOMS.index(name.split(".")[0]) > own]


def test_every_folder_and_file_has_its_place():
    places = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert places == {*ROOMS, *ENTRY}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_from_a_room_above(room):
    found = modules()
    wrong = [
        line
        for name, file in found.items()
        if name.split(".")[0] == room
        for line in upstairs(name, imported(file.read_text(), set(found)))
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle():
    found = modules()
    graph = {name: imported(file.read_text(), set(found)) - {name} for name, file in found.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(found)


def test_an_import_upstairs_is_seen_wherever_it_stands():
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from lit_puzzle.search.search import search
def late():
    import lit_puzzle.callbacks.generation_length
    from lit_puzzle.rl import module
"""
    targets = imported(text, set(modules()))
    assert targets == {"search.search", "callbacks.generation_length", "rl", "rl.module"}
    assert len(upstairs("costs.gpus", targets)) == 4
    assert upstairs("cli", targets) == []


def files_of_tests() -> list[Path]:
    return sorted(path.relative_to(TESTS) for path in TESTS.glob("**/test_*.py"))


def test_every_folder_of_tests_is_a_room():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders - BESIDE_ROOMS <= set(ROOMS)


def test_a_test_file_lies_in_the_room_of_the_file_it_is_named_after():
    """Files of the same name in several rooms are tested in any of them."""
    rooms: dict[str, set[str]] = {}
    for name in modules():
        room, *_, stem = ["", *name.split(".")] if "." not in name else name.split(".")
        rooms.setdefault(stem, set()).add(room)
    wrong = [path for path in files_of_tests() if path.parent.name not in rooms.get(path.stem[5:], {path.parent.name})]
    assert wrong == []


def test_no_two_test_files_have_one_name():
    """Pytest imports test files by their names alone, so that the second would not be found."""
    names = [path.name for path in files_of_tests()]
    assert len(names) == len(set(names)) > 100
