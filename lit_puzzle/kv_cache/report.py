"""Report on KV scales: metrics of each layer and totals, a Markdown table, and a plot of amax.

Writes kv_scales.md, kv_amax.png and kv_amax.svg. The plot needs matplotlib, which is imported after the scales are
saved.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lit_puzzle.kv_cache.scales import E4M3_MAX, KVScales, LayerScales, Window
from lit_puzzle.run.files import write_atomically

KINDS = {"k": "#1b6ca8", "v": "#e07b39"}  # and their colors


def per_layer(layers: Sequence[LayerScales | None], prefix: str = "kv") -> dict[str, float]:
    """Return `<prefix>/<layer>/<k or v>_amax|scale|headroom|overflow` of layers with scales: the largest of heads."""
    values: dict[str, float] = {}
    for layer, both in enumerate(layers):
        for kind, one in () if both is None else (("k", both.k), ("v", both.v)):
            values[f"{prefix}/{layer}/{kind}_amax"] = float(one.amax.max())
            values[f"{prefix}/{layer}/{kind}_scale"] = float(one.scale.max())
            values[f"{prefix}/{layer}/{kind}_headroom"] = one.headroom
            values[f"{prefix}/{layer}/{kind}_overflow"] = float(one.overflow)
    return values


def totals(scales: KVScales) -> dict[str, float]:
    """Return the metrics over all layers; only the counts if no layer has scales."""
    found = [both for both in scales.layers if both is not None]
    results = {
        "tokens": float(scales.tokens),
        "layers": float(len(scales.layers)),
        "layers_in_bf16": float(len(scales.layers) - len(found)),
    }
    if found:
        results |= {
            "overflow": float(sum(both.k.overflow + both.v.overflow for both in found)),
            "headroom/min": min(min(both.k.headroom, both.v.headroom) for both in found),
            "k_amax/max": max(float(both.k.amax.max()) for both in found),
            "v_amax/max": max(float(both.v.amax.max()) for both in found),
        }
    return results


def write_report(folder: Path, scales: KVScales, windows: Sequence[Window]) -> None:
    """Write the table and the plot."""
    write_atomically(folder / "kv_scales.md", table(scales, windows))
    draw_amax(folder, scales, windows)


def table(scales: KVScales, windows: Sequence[Window]) -> str:
    """Return a Markdown table with a row for each layer; cells list the heads if scales are per head."""
    lines = [
        "# FP8 KV scales",
        "",
        f"{scales.tokens} tokens, method {scales.method}, rounding {scales.rounding}.",
        "",
        "| layer | window | K amax | K scale | K headroom | V amax | V scale | V headroom | values beyond |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for layer, (both, window) in enumerate(zip(scales.layers, windows, strict=True)):
        head = f"| {layer} | {'full' if window is None else window} |"
        lines.append(f"{head} bf16 | | | | | | |" if both is None else f"{head} {_row(both)} |")
    return "\n".join(lines) + "\n"


def _row(both: LayerScales) -> str:
    cells = []
    for one in (both.k, both.v):
        cells += [_numbers(one.amax), _numbers(one.scale), f"{one.headroom:.2f}"]
    return " | ".join([*cells, str(both.k.overflow + both.v.overflow)])


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())


def draw_amax(folder: Path, scales: KVScales, windows: Sequence[Window]) -> None:
    """Plot amax of K and V of each layer as dots (hollow: windowed), and the largest FP8 value as bars above them."""
    from matplotlib.figure import Figure  # no pyplot: a Figure by itself needs no display

    figure = Figure(figsize=(max(5.0, 0.28 * len(windows)), 3.2), layout="constrained")
    axes = figure.subplots()
    for (kind, color), shift in zip(KINDS.items(), (-0.15, 0.15), strict=True):
        named = {"amax": f"amax of {kind.upper()}", "held": f"448 x scale of {kind.upper()}"}
        for layer, (both, window) in enumerate(zip(scales.layers, windows, strict=True)):
            if both is None:
                continue
            one = both.k if kind == "k" else both.v
            face = color if window is None else "white"
            for amax, scale in zip(one.amax.flatten().tolist(), one.scale.flatten().tolist(), strict=True):
                x, held = layer + shift, E4M3_MAX * scale
                axes.plot(x, amax, "o", color=color, markerfacecolor=face, label=named.pop("amax", None))
                axes.plot([x - 0.13, x + 0.13], [held, held], color=color, label=named.pop("held", None))
    axes.set_yscale("log", base=2)
    axes.set_xlabel("layer (hollow: windowed)")
    axes.set_ylabel("magnitude")
    axes.set_xlim(-0.6, len(windows) - 0.4)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(folder / "kv_amax.png", dpi=120)
    figure.savefig(folder / "kv_amax.svg", metadata={"Date": None})
