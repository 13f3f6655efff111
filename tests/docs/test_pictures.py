"""The pictures of README and docs say what the sources say: the rooms' imports, the formula of the request rate."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_stair_reads_order_and_imports_from_source(tmp_path: Path) -> None:
    stair = load("stair_picture")
    test = tmp_path / "test_rooms.py"
    test.write_text('ROOMS = (*("ground", "first"), *("top",))\n')
    assert stair.ordered_rooms(test) == ["ground", "first", "top"]
    source = "import package.ground.a\ndef late():\n    from package.first import b\n    from other.top import c\n"
    assert stair.imported_rooms(source, "package") == {"ground", "first"}


def test_stair_draws_imports_left_of_the_step() -> None:
    stair = load("stair_picture")
    svg = stair.draw(["ground", "top"], {"ground": set(), "top": {"ground", "top"}}, {"ground": "A <room>", "top": "B"})
    assert svg.count("<circle") == 1 and svg.count('class="step"') == 2 and "A &lt;room&gt;" in svg
    step = stair.LEFT + stair.CELL  # of the second room
    assert f'cx="{step - stair.CELL // 2}"' in svg


def test_committed_stair_has_the_rooms_of_the_test() -> None:
    stair = load("stair_picture")
    rooms = stair.ordered_rooms(stair.ROOT / "tests" / "test_rooms.py")
    drawn = (stair.ROOT / "docs" / "assets" / "stair.svg").read_text()
    names = [line.split(">")[1].split("<")[0] for line in drawn.splitlines() if 'class="room"' in line]
    assert names == rooms, "draw it anew: python scripts/stair_picture.py"


def evaluation(folder: Path, accuracy: float, tokens: dict[str, float]) -> Path:
    folder.mkdir()
    results = {f"tokens/{effort}": value for effort, value in tokens.items()}
    for effort in tokens:
        results |= {f"accuracy/{effort}": accuracy, f"accuracy_se/{effort}": 0.01}
    (folder / "run.json").write_text(json.dumps({"results": results}))
    return folder


def test_front_picture_counts_requests_relative_to_the_parent_at_high_effort(tmp_path: Path) -> None:
    front = load("front_picture")
    parent = front.read_points(evaluation(tmp_path / "parent", 0.5, {"low": 10.0, "high": 40.0}))
    child = front.read_points(evaluation(tmp_path / "child", 0.4, {"low": 20.0, "high": 40.0}))
    assert [point.effort for point in parent] == ["low", "high"]
    assert front.relative_rates(parent, 1.0, parent) == [4.0, 1.0]
    assert front.relative_rates(child, 1.5, parent) == [3.0, 1.5]


@pytest.mark.parametrize(("measured", "told"), [(None, "predicted"), (2.0, "measured")])
def test_front_picture_says_where_its_speed_comes_from(tmp_path: Path, measured: float | None, told: str) -> None:
    front = load("front_picture")
    points = front.read_points(evaluation(tmp_path / "parent", 0.5, {"low": 10.0, "high": 40.0}))
    blocks = [{"experts": [0, 2], "window_tokens": None}, {"experts": [1], "window_tokens": 8}]
    plan = {"num_parent_experts": 4, "blocks": blocks}
    scenario = {"prompt_tokens": 96, "generated_tokens": 48}
    search = {"plan": plan, "predicted": [{"target": {"scenario": scenario}, "speedup": 1.25}]}
    figure = front.draw(search, {"parent": points, "child": points}, measured)
    left, right = figure.axes
    assert told in right.get_xlabel() and f"{measured or 1.25:.2f}x" in right.get_xlabel()
    (child,) = [line for line in right.get_lines() if line.get_label() == "child"]
    assert list(child.get_xdata()) == [4 * (measured or 1.25), measured or 1.25]
    assert sum(bar.get_height() for bar in left.patches) == 4 + 4 + 2 + 1  # outlines, then what stays


def test_front_picture_names_a_folder_without_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.json; make it with: lightning run recipes/evaluate.yaml"):
        load("front_picture").read_points(tmp_path)


def test_math_fences_become_mathml() -> None:
    pytest.importorskip("latex2mathml")
    html = load("math_fence").mathml("a = b^2\n\nc \\le d\n", "math", "math", {}, None)
    assert html.count("<math") == 2 and "<msup>" in html


def test_named_lines_of_docstrings_become_a_list_or_paragraphs() -> None:
    pytest.importorskip("griffe")
    text = (
        "What it is.\nReads: a folder.\n  Memory: P b\n    + 2 P b / L\n  Disk: P b.\nSource: a paper.\n    code: kept"
    )
    assert load("docstring_lists").apart(text).splitlines() == [
        *("What it is.", "", "Reads: a folder.", "", "- Memory: P b", r"  \+ 2 P b / L", "- Disk: P b.", ""),
        *("Source: a paper.", "", "    code: kept"),
    ]
