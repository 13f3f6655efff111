"""report.py: the table in Markdown, and the bars and curves of the pictures."""

from typing import Any

import matplotlib.figure
import pytest
from helpers.two_layer_library import CONFIG, LIBRARY

from lit_puzzle.library.library import Library
from lit_puzzle.search.report import FULL, NARROWED, OWN_WINDOW, SweepPoint, draw_curve, draw_plan, write_table
from lit_puzzle.spec import BlockSpec, Plan

SCENARIO = {"num_gpus": 8, "gpu": "H100", "prompt_tokens": 64, "generated_tokens": 32}
COST: dict[str, Any] = {"tokens_per_second": 123.0, "memory_gib": 5.5, "latency_seconds": 2.0, "batch_size": 7}
TRIED = {"deployments_and_batches_tried": [48, 26]}
COST["deployment"] = {"tensor_parallel": 4}


def record(**changes):
    plan = LIBRARY.plan(["experts=2", "experts=2,window=8"])
    made = {
        "plan": plan.to_json(),
        "quality_loss": 0.5,
        "optimality": {"solver": "mip", "seconds": 0.25, "bound": 0.5, "gap": 0.0, "proven": True, **TRIED},
        "predicted": [
            {
                "target": {"scenario": SCENARIO},
                "required_tokens_per_second": 100.0,
                "parent": None,
                "child": COST,
                "speedup": None,
            }
        ],
        "scores": [
            {"layer": 0, "candidate": "experts=2", "quality_loss": 0.3},
            {"layer": 1, "candidate": "experts=2,window=8", "quality_loss": 0.2},
        ],
        "alternatives": [{"quality_loss": 0.75, "candidates": ["experts=2", "parent"]}],
        "sweep": [
            {"throughput_over_parent": 1.2, "quality_loss": None, "proven": True},
            {"throughput_over_parent": 1.1, "quality_loss": None, "proven": False},
            {"throughput_over_parent": 1.0, "quality_loss": 0.125, "proven": False},
        ],
    }
    return made | changes


def test_the_table_has_every_result(tmp_path):
    write_table(tmp_path / "search.md", record())
    text = (tmp_path / "search.md").read_text()
    for line in (
        "The plan has a quality loss of 0.5, found by `mip` in 0.25 s. It is proven to be optimal for all deployments "
        "and batch sizes tried (48 and 26).",
        "| 8 x H100, 64/32 | parent | does not fit | | | | | | |",
        "| 8 x H100, 64/32 | child | 123 |  | 100 | 5.5 | 2 | 4 | 7 |",
        "| 1 | experts=2,window=8 | 2 | 8 | 0.2 |",
        "| 1 | 0.75 | 1 |",
        "| 1.2 | no plan exists |",
        "| 1.1 | no plan found |",
        "| 1 | 0.125 (not proven) |",
    ):
        assert line in text.splitlines(), line


@pytest.mark.parametrize(
    ("gap", "bound", "report"),
    [(0.1, 0.45, "The lower bound is 0.45 for all"), (None, None, "It is not proven to be optimal.")],
)
def test_what_is_not_proven_is_reported(tmp_path, gap, bound, report):
    optimality = {"solver": "mip", "seconds": 1.0, "bound": bound, "gap": gap, "proven": False, **TRIED}
    write_table(tmp_path / "search.md", record(optimality=optimality))
    assert report in (tmp_path / "search.md").read_text()


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved, instead of writing their files."""
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: figures.append((figure, path)))
    return figures


def filled(figure):
    """Return the bars of kept experts; the empty ones behind them are the parent's."""
    return [bar for bar in figure.axes[0].patches if bar.get_facecolor()[3] > 0]


def test_bars_and_colors_of_the_plan(tmp_path, drawn):
    blocks = (BlockSpec((0,), 8), BlockSpec((0, 1, 2), None))
    draw_plan(tmp_path, LIBRARY, Plan("parent", 4, blocks).to_json())
    (figure, path), _ = drawn
    bars = filled(figure)
    assert path == tmp_path / "plan.png"
    assert [bar.get_height() for bar in bars] == [1, 3]
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in bars]
    assert colors == [OWN_WINDOW, FULL]
    drawn.clear()
    draw_plan(tmp_path, LIBRARY, LIBRARY.plan(["parent", "window=8"]).to_json())
    bars = filled(drawn[0][0])
    assert [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in bars] == [OWN_WINDOW, NARROWED]
    assert [text.get_text() for text in drawn[0][0].axes[0].texts] == ["8"]


def test_the_curve_shows_where_no_plan_exists(tmp_path, drawn):
    draw_curve(
        tmp_path,
        [
            SweepPoint(1.0, 0.5, True),
            SweepPoint(1.1, 0.75, True),
            SweepPoint(1.5, None, True),
            SweepPoint(1.4, None, False),
        ],
    )
    found, missing, unknown = drawn[0][0].axes[0].lines
    assert found.get_xydata().tolist() == [[1.0, 0.5], [1.1, 0.75]]
    assert missing.get_xdata().tolist() == [1.5] and missing.get_label() == "no plan exists"
    assert unknown.get_xdata().tolist() == [1.4] and unknown.get_label() == "no plan found"


def test_a_library_of_another_depth_is_refused(tmp_path):
    deeper = Library("parent", 4, CONFIG, LIBRARY.layers)
    with pytest.raises(ValueError, match="zip"):
        draw_plan(tmp_path, deeper, Plan("parent", 4, (BlockSpec((0,), 8),)).to_json())
