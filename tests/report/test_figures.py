"""Pictures of a report: what a long training costs on the page."""

from lit_puzzle.report.figures import LIGHT, Series, curves, svg


def drawn(updates: int) -> str:
    """Return the picture of a curve that rises and falls."""
    points = [(float(update), float(update % 7)) for update in range(updates)]
    return svg(curves({"loss": [Series("train/loss", points, 0)]}), LIGHT).decode()


def test_only_short_curves_have_a_mark_for_each_point() -> None:
    few, none = (drawn(updates).count("<use") for updates in (200, 2000))
    assert few > 200 > none
    assert len(drawn(2000)) < 2000 * 50
