"""The pages of the site: every command resolves, every page is in the navigation, every recipe is on a page."""

import re
import tomllib
from pathlib import Path

import pytest
from helpers.shown_commands import shown_commands

from lit_puzzle.cli import main
from lit_puzzle.run.recipe import PACKAGED_RECIPES, packaged_recipes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMMANDS = {page: shown_commands(page.read_text()) for page in PAGES}


def navigated(entries: list[str | dict[str, object]]) -> list[str]:
    """The files of a navigation, sections flattened."""
    found: list[str] = []
    for entry in entries:
        for value in [entry] if isinstance(entry, str) else entry.values():
            found += [value] if isinstance(value, str) else navigated(value)  # type: ignore[arg-type]
    return found


def test_loops_continued_lines_and_chains_become_single_commands() -> None:
    page = "```yaml\nx: 1\n```\n```bash\nfor s in a b; do lightning run $s.yaml; done\n"
    page += "lightning run c.yaml \\\n  --x='1\n2' && bash d.sh # e\n```\n"
    assert shown_commands(page) == [
        ["lightning", "run", "a.yaml"],
        ["lightning", "run", "b.yaml"],
        ["lightning", "run", "c.yaml", "--x=1\n2"],
        ["bash", "d.sh"],
    ]


def test_navigation_holds_every_page_once() -> None:
    with (ROOT / "zensical.toml").open("rb") as file:
        nav = navigated(tomllib.load(file)["project"]["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "extending"], ids=lambda page: page.stem)
@pytest.mark.slow
def test_every_shown_lightning_run_resolves(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in [words[1:] for words in COMMANDS[page] if words[0] == "lightning"]:
        if words[0] == "run" and "--plan" not in words:
            with pytest.raises(SystemExit) as stopped:
                main([*words, "--print_config"])
            assert stopped.value.code == 0, words
        else:
            main(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_other_command_names_a_script_that_exists(page: Path) -> None:
    for words in COMMANDS[page]:
        if words[0] in ("bash", "python") and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words


def test_every_recipe_of_a_stage_is_embedded_on_its_page() -> None:
    embedded = {
        name for page in PAGES for name in re.findall(r"^--8<-- \"recipes/(\w+)\.yaml\"", page.read_text(), re.M)
    }
    mains = {path.stem for path in packaged_recipes() if path.parent == Path()}
    assets = {"tiny_parent", "generate_low", "distill_short", "tiny_child"}
    assert mains - embedded == assets | {"assemble_rope"}  # of an ablation
    assert all((PACKAGED_RECIPES / f"{name}.yaml").is_file() for name in embedded)
