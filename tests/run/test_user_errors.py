"""ValueErrors of the user are one line; those of libraries keep their traceback, wherever the library lies."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lit_puzzle.run import user_errors
from lit_puzzle.run.files import read_text
from lit_puzzle.run.user_errors import one_line_errors, printable, users_error

ROOT = Path(__file__).parents[2]
LIBRARY = "def refuse():\n    raise ValueError('wrong in the library')\n"
STAGE = """import their_library

def stage(run_dir, own: bool = False):
    if own:
        raise ValueError("wrong in the stage")
    their_library.refuse()
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A current folder with a stage of the user and its recipe."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "my_stage.py").write_text(STAGE)
    (folder / "recipe.yaml").write_text("command: my_stage.stage\nrun_dir: run\n")
    return folder


def said(work: Path, *words: str, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the recipe as the console script does, without the current folder on the path."""
    code = "import sys; from lit_puzzle.cli import main; main(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    command = [sys.executable, "-P", "-c", code, "run", "recipe.yaml", *words]
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("place", ["python_path", "lib/python3/dist-packages", ".venv/lib/python3.12/site-packages"])
@pytest.mark.slow
def test_a_library_keeps_its_traceback(work: Path, place: str) -> None:
    """In a folder of PYTHONPATH, of the system, and of a virtual environment inside the current folder."""
    folder = work / place
    folder.mkdir(parents=True)
    (folder / "their_library.py").write_text(LIBRARY)
    result = said(work, paths=(folder,))
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback") and result.stderr.endswith("ValueError: wrong in the library\n")


def test_a_library_in_a_zip_file_keeps_its_traceback(work: Path) -> None:
    with zipfile.ZipFile(work / "library.zip", "w") as archive:
        archive.writestr("their_library.py", LIBRARY)
    result = said(work, paths=(work / "library.zip",))
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_a_stage_of_the_current_folder_is_one_line(work: Path) -> None:
    (work / "their_library.py").write_text(LIBRARY)
    result = said(work, "--own=true")
    assert (result.returncode, result.stderr) == (2, "error: wrong in the stage\n")
    assert said(work).stderr == "error: wrong in the library\n"  # a module beside the stage is the user's too


def test_a_stage_from_elsewhere_is_the_users_as_well(work: Path, tmp_path: Path) -> None:
    """The recipe names its package; what that package calls is still a library."""
    elsewhere, library = tmp_path / "mine", tmp_path / "theirs"
    for folder, name, text in ((elsewhere, "my_stage.py", STAGE), (library, "their_library.py", LIBRARY)):
        folder.mkdir()
        (folder / name).write_text(text)
    (work / "my_stage.py").unlink()
    shutil.rmtree(work / "__pycache__", ignore_errors=True)
    paths = (elsewhere, library)
    assert said(work, "--own=true", paths=paths).stderr == "error: wrong in the stage\n"
    assert "Traceback" in said(work, paths=paths).stderr


def wrapped() -> None:
    try:
        int("x")  # raised by the interpreter, in a module of the tests
    except ValueError as error:
        raise RuntimeError("wrapped") from error


def test_the_users_error_is_found_behind_what_libraries_wrap_around_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        wrapped()
    assert users_error(caught.value, {"test_user_errors"}) is caught.value.__cause__
    assert users_error(caught.value, set()) is None
    assert users_error(KeyError("x"), {"test_user_errors"}) is None


def test_installed_packages_are_looked_up_only_for_names_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up takes 0.3 seconds."""
    asked: list[str] = []

    def distributions() -> dict[str, list[str]]:
        asked.append("all")
        return {"test_user_errors": ["their-package"]}

    monkeypatch.setattr(user_errors.metadata, "packages_distributions", distributions)
    with pytest.raises(SystemExit), one_line_errors(None, {"their_package", "lightning"}):
        users_file()
    assert asked == []
    with pytest.raises(ValueError, match="wrong"), one_line_errors(None, {__name__}):  # an installed package
        raise ValueError("wrong")
    assert asked == ["all"]


def users_file() -> None:
    read_text(Path("no such file"))  # refused by this package


def test_message_cannot_command_the_terminal_and_is_not_endless() -> None:
    assert printable("unknown tensor \x1b[2J\u202e of a\nb") == "unknown tensor \\x1b[2J\\u202e of a\nb"
    shown = printable("a" * 9000 + "the end")
    assert shown.endswith("the end") and "[... 5,007 characters ...]" in shown and len(shown) < 4100


def test_an_error_in_any_type_of_a_union_is_found() -> None:
    """jsonargparse chains the first type's error only, here that a strategy is no text."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch.strategies import Strategy

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=str | Strategy)
    given = {"class_path": "lit_puzzle.training.sharding.Sharded", "init_args": {"timeout_hours": 1e300}}
    parsed = parser.parse_object({"strategy": given})
    with pytest.raises(ValueError, match="Union subtypes") as refused:
        parser.instantiate(parsed)
    assert str(users_error(refused.value, ())).startswith("strategy: timeout_hours 1e+300 was given")
