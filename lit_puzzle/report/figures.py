"""Pictures of a report: functions from numbers to a matplotlib figure, in the colors of a light or a dark page.

Reads and writes nothing; `svg` and `png` give a figure's bytes. Needs matplotlib, which is imported when one is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"low": "v", "medium": "s", "high": "^"}  # of efforts
DOTS, MOST_TICKS, MOST_MARKS = 130, 12, 300  # per inch, of PNG files; labels of layers; of a curve, 100 bytes each


@dataclass(frozen=True)
class Colors:
    """Colors that can be told apart on one background.

    Attributes:
        scheme: `light` or `dark`.
        page: the background, which PNG files have.
        text: text and axes.
        faint: grid and outlines.
        series: of models, windows and efforts, in this order.
        heat: name of matplotlib's color map for heat maps.
    """

    scheme: str
    page: str
    text: str
    faint: str
    series: tuple[str, ...]
    heat: str


LIGHT = Colors("light", "#fff", "#1f2328", "#d0d7de", ("#57606a", "#1b6ca8", "#d9662b", "#4d8048", "#7b4b94"), "Blues")
DARK = Colors("dark", "#0d1117", "#e6edf3", "#444", ("#9da7b3", "#6cb6ff", "#f0883e", "#7ee787", "#d2a8ff"), "viridis")

Draw = Callable[[Colors], "Figure"]


@dataclass(frozen=True)
class Series:
    """A line of a panel.

    Attributes:
        label: its name in the legend.
        points: (update, value).
        place: of its color among `Colors.series`.
    """

    label: str
    points: Sequence[tuple[float, float]]
    place: int


@dataclass(frozen=True)
class Setting:
    """A model at one effort in the plane of request rate and accuracy; intervals are (low, high)."""

    effort: str
    rate: float
    accuracy: float
    rate_interval: tuple[float, float] | None
    accuracy_interval: tuple[float, float] | None


def svg(draw: Draw, colors: Colors) -> bytes:
    """Return a picture as SVG with a transparent background; the same numbers give the same bytes."""
    return _saved(draw, colors, format="svg", transparent=True, metadata={"Date": None})


def png(draw: Draw, colors: Colors = LIGHT) -> bytes:
    """Return a picture as PNG."""
    return _saved(draw, colors, format="png", dpi=DOTS, facecolor=colors.page, metadata={"Software": None})


def _saved(draw: Draw, colors: Colors, **how: object) -> bytes:
    from matplotlib import rc_context

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    text = dict.fromkeys(names, colors.text)
    style = text | {"axes.facecolor": "none", "grid.color": colors.faint, "font.size": 9, "svg.hashsalt": "report"}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8}
    with rc_context(style):
        buffer = io.BytesIO()
        draw(colors).savefig(buffer, **how)  # type: ignore[arg-type]
    return buffer.getvalue()


def layer_map(kept: Sequence[Sequence[int]], experts: int, windows: Sequence[int | None]) -> Draw:
    """Return a map of a child: a column for each layer, a cell for each expert, colored by attention where it is kept.

    Args:
        kept: indices of the experts that each layer keeps.
        experts: number of experts of a layer of the parent.
        windows: window of each layer in tokens; None: full attention.
    """

    def draw(colors: Colors) -> Figure:
        from matplotlib.colors import to_rgba

        sizes = sorted({window for window in windows if window is not None})
        shades = {None: colors.series[1]} | dict(zip(sizes, _shades(colors, len(sizes)), strict=True))
        cells = [[to_rgba(colors.faint, 0.35)] * len(kept) for _ in range(experts)]
        for layer, (own, window) in enumerate(zip(kept, windows, strict=True)):
            for expert in own:
                cells[expert][layer] = to_rgba(shades[window])
        figure, axes = _figure(_width(len(kept)), 3.4)
        axes.imshow(cells, aspect="auto", interpolation="nearest", origin="lower")
        _grid(axes, len(kept), experts, colors)
        axes.set(xlabel="layer", ylabel="expert")
        _layers(axes, len(kept))
        for window in (None, *sizes):
            label = "full attention" if window is None else f"window of {window:,} tokens"
            if window in windows:
                axes.plot([], [], "s", color=shades[window], label=label)
        axes.plot([], [], "s", color=colors.faint, label="expert pruned")
        _legend(axes, 4)
        return figure

    return draw


def heat_map(rows: Sequence[Sequence[float | None]], names: Sequence[str], measure: str) -> Draw:
    """Return a heat map: a column for each layer, a row for each name; empty where there is no value.

    The scale is logarithmic where all values are above 0.

    Args:
        rows: values, a row for each name and a column for each layer.
        names: of the rows; empty: rows are numbered.
        measure: what the colors mean.
    """

    def draw(colors: Colors) -> Figure:
        import numpy as np
        from matplotlib.colors import LogNorm, Normalize

        values = np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)
        known = values[np.isfinite(values)]
        norm = LogNorm if known.size and known.min() > 0 else Normalize
        figure, axes = _figure(_width(values.shape[1]), 1.2 + min(3.0, max(1.2, 0.24 * len(rows))))
        image = axes.imshow(
            np.ma.masked_invalid(values),
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            cmap=colors.heat,
            norm=norm(),
        )
        _grid(axes, values.shape[1], len(rows), colors)
        _layers(axes, values.shape[1])
        axes.set(xlabel="layer", ylabel="" if names else "expert")
        if names:
            axes.set_yticks(range(len(names)), names)
        figure.colorbar(image, ax=axes, label=measure, pad=0.02)
        return figure

    return draw


def curves(panels: Mapping[str, Sequence[Series]]) -> Draw:
    """Return curves over updates, a panel for each name, one below the other."""

    def draw(colors: Colors) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 0.6 + 1.7 * len(panels)), layout="constrained")
        every = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (name, lines) in zip(every, panels.items(), strict=True):
            for line in lines:
                form = ".-" if len(line.points) <= MOST_MARKS else "-"
                axes.plot(*zip(*line.points, strict=True), form, color=_color(colors, line.place), label=line.label)
            axes.set_ylabel(name)
            axes.grid(alpha=0.5)
            axes.legend(ncols=3)
        every[-1].set_xlabel("update")
        return figure

    return draw


def frontier(
    models: Mapping[str, Sequence[Setting]], lines: Mapping[str, Sequence[tuple[float, float]]], reference: str
) -> Draw:
    """Return accuracy against relative request rate, with intervals and the envelope of each model.

    Args:
        models: settings of each model, the parent first.
        lines: points (request rate, accuracy) of each model's frontier.
        reference: effort at which the parent's request rate is 1.
    """

    def draw(colors: Colors) -> Figure:
        figure, axes = _figure(6.4, 3.8)
        for place, (name, settings) in enumerate(models.items()):
            color = _color(colors, place)
            if lines.get(name):
                axes.plot(*zip(*lines[name], strict=True), color=color, linewidth=1.2, alpha=0.7)
            for setting in settings:
                _cross(axes, setting, color)
                axes.plot(setting.rate, setting.accuracy, MARKERS.get(setting.effort, "o"), color=color, markersize=7)
            axes.plot([], [], color=color, label=name)
        for effort, marker in MARKERS.items():
            if any(setting.effort == effort for settings in models.values() for setting in settings):
                axes.plot([], [], marker, color=colors.faint, label=f"{effort} effort")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelsize=7)
        axes.set(xlabel=f"request rate, relative to the parent's at {reference} effort", ylabel="accuracy")
        axes.grid(alpha=0.5)
        _legend(axes, 5)
        return figure

    return draw


def bars(groups: Sequence[str], values: Mapping[str, Sequence[float]], measure: str) -> Draw:
    """Return bars side by side on a logarithmic scale.

    Args:
        groups: names along the axis.
        values: a value above 0 for each group, of each kind of bar.
        measure: name and unit of the values.
    """

    def draw(colors: Colors) -> Figure:
        figure, axes = _figure(6.4, 3.0)
        width = 0.8 / len(values)
        for place, (name, heights) in enumerate(values.items()):
            left = [group + (place - (len(values) - 1) / 2) * width for group in range(len(groups))]
            axes.bar(left, heights, width=width, color=_color(colors, place), label=name)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_yscale("log")
        axes.set_ylabel(measure)
        _legend(axes, 3)
        return figure

    return draw


def _shades(colors: Colors, count: int) -> list[str]:
    """Return colors for so many windows: those of the page, or of a scale where they are too few."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if count <= len(colors.series) - 2:
        return list(colors.series[2 : 2 + count])
    return [to_hex(colormaps["plasma"](place / (count - 1))) for place in range(count)]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # without pyplot no display is needed

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _width(layers: int) -> float:
    return max(6.4, 1.5 + 0.22 * layers)


def _color(colors: Colors, place: int) -> str:
    return colors.series[place % len(colors.series)]


def _cross(axes: Axes, setting: Setting, color: str) -> None:
    """Draw both intervals of a setting."""
    how = {"fmt": "none", "capsize": 2, "color": color, "linewidth": 1.0}
    across, along = _ends(setting.rate, setting.rate_interval), _ends(setting.accuracy, setting.accuracy_interval)
    axes.errorbar([setting.rate], [setting.accuracy], xerr=across, yerr=along, **how)  # type: ignore[arg-type]


def _ends(center: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    """Return the lengths of an interval's two sides, as matplotlib takes them."""
    return None if interval is None else [[max(0.0, center - interval[0])], [max(0.0, interval[1] - center)]]


def _layers(axes: Axes, count: int) -> None:
    axes.set_xticks(range(0, count, max(1, -(-count // MOST_TICKS))))


def _grid(axes: Axes, columns: int, rows: int, colors: Colors) -> None:
    """Draw thin lines between cells that are large enough for them."""
    for position in range(1, columns):
        axes.axvline(position - 0.5, color=colors.page, linewidth=0.6)
    for position in range(1, rows if rows <= 40 else 0):
        axes.axhline(position - 0.5, color=colors.page, linewidth=0.6)
    axes.spines[:].set_visible(False)


def _legend(axes: Axes, columns: int) -> None:
    axes.figure.legend(loc="outside lower center", ncols=columns)
