"""Plot the layers of a child: number of experts as bars, attention as color.

Writes one PNG file. Needs matplotlib, which is imported when the plot is drawn.
"""

from __future__ import annotations

from pathlib import Path

from lit_puzzle.serve.configs import Blocks

FULL = "#1b6ca8"
WINDOWS = ("#9db4c0", "#e07b39", "#b5a642", "#7b4b94")  # of windows, smallest first; the last color for all larger ones


def draw_blocks(path: Path, blocks: Blocks, parent_experts: int | None) -> None:
    """Draw one bar for each layer, over an outline of the parent's number of experts.

    Args:
        path: the PNG file to write.
        blocks: number of experts and window of every layer.
        parent_experts: number of experts in a layer before pruning; None: no outline.
    """
    from matplotlib.figure import Figure  # no pyplot: a Figure by itself needs no display

    sizes = sorted({window for _, window in blocks if window is not None})
    colors = {size: WINDOWS[min(place, len(WINDOWS) - 1)] for place, size in enumerate(sizes)}
    figure = Figure(figsize=(max(5.0, 0.28 * len(blocks)), 3.2), layout="constrained")
    axes = figure.subplots()
    for window in (None, *sizes):
        layers = [layer for layer, (_, own) in enumerate(blocks) if own == window]
        label = "full attention" if window is None else f"window of {window} tokens"
        color = FULL if window is None else colors[window]
        if layers:
            axes.bar(layers, [blocks[layer][0] for layer in layers], color=color, label=label)
    if parent_experts is not None:
        axes.bar(range(len(blocks)), parent_experts, color="none", edgecolor="#bbbbbb", linewidth=0.8)
    axes.set_xlabel("layer")
    axes.set_ylabel("experts")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
