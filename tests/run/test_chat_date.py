"""The date that a chat template reads is a key of every recipe: recorded and kept; another one is refused on resume."""

import json
from pathlib import Path

import pytest
import yaml

from lit_puzzle.cli import main
from lit_puzzle.run.inputs import dated, run_date


def noted_date(run_dir: Path) -> dict[str, float]:
    """A stage that needs the date."""
    (run_dir / "results.json").write_text(json.dumps(run_date(run_dir)))
    if not (run_dir.parent / "again").exists():
        raise RuntimeError("interrupted")
    return {}


def recipe(folder: Path, **keys: object) -> list[str]:
    content = {"command": "test_chat_date.noted_date", "run_dir": str(folder / "run"), **keys}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return ["run", str(folder / "recipe.yaml")]


@pytest.mark.parametrize("given", ["file", "word"])
def test_a_recipe_gives_the_date(tmp_path: Path, given: str) -> None:
    words = recipe(tmp_path, **({"chat_date": "2025-08-05"} if given == "file" else {}))
    words += ["--chat_date=2025-08-05"] if given == "word" else []
    with pytest.raises(RuntimeError, match="interrupted"):
        main(words)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == "2025-08-05"
    (tmp_path / "again").touch()
    with pytest.raises(SystemExit):  # another date is another recipe
        main([*words, "--chat_date=2025-08-06"])
    main(words)
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["date"] == "2025-08-05"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["chat_date"] == "2025-08-05"


def test_without_the_key_it_is_the_first_day_and_no_part_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "again").touch()
    main(recipe(tmp_path))
    assert "chat_date:" not in (tmp_path / "run" / "config.yaml").read_text()


def test_no_date_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*recipe(tmp_path), "--chat_date=yesterday"])
    assert "chat_date is 'yesterday'; an ISO date is needed, such as 2026-01-31." in capsys.readouterr().err
    with pytest.raises(ValueError, match="an ISO date is needed"), dated("2026-13-01"):
        pass


def test_an_unquoted_date_of_yaml_is_one(tmp_path: Path) -> None:
    (tmp_path / "again").touch()
    words = recipe(tmp_path)
    with (tmp_path / "recipe.yaml").open("a") as stream:
        stream.write("chat_date: 2025-08-05\n")
    main(words)
    assert run_date(tmp_path / "run") == "2025-08-05"
