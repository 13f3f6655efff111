"""Disk and traffic of a model that is read from disk one layer at a time, and of the hidden states between its layers.

    files     2 T D b, the states that enter and that leave a layer; more where candidates have files of their own
    traffic   P the stored checkpoint for every pass of every process, 2 T D b of states for every layer that runs

T tokens of all processes, D channels, b bytes. Pure functions; imports no torch. Counted is
`lit_puzzle.model.layer_pass`.
"""

from __future__ import annotations

from lit_puzzle.model.footprint import ModelSize, stored_bytes

FILES = 2  # of states: entering and leaving the layer at work
STATES = "hidden states between layers"


def is_streamed(budget_gib: object) -> bool:
    """Return whether a recipe's `memory_gib` reads the model layer by layer."""
    return isinstance(budget_gib, int | float)


def state_files(size: ModelSize, width: int, tokens: float, files: float = FILES) -> dict[str, float]:
    """Return the bytes of the files of hidden states that exist at once.

    Args:
        size: the model.
        width: bytes of a number.
        tokens: of the pass, of all processes.
        files: states of all tokens that are kept at once.
    """
    return {STATES: files * tokens * size.hidden * width}


def pass_traffic(
    size: ModelSize, width: int, tokens: float, processes: int, passes: float = 1, layers: float | None = None
) -> dict[str, float]:
    """Return the bytes that are read from and written to disk, over all processes.

    Args:
        size: the model.
        width: bytes of a number of the states.
        tokens: of a pass, of all processes.
        processes: each of which reads the model.
        passes: how often the whole model is read.
        layers: layers that all tokens run through in all passes; None: those of the model in each pass.
    """
    run = passes * len(size.layers) if layers is None else layers
    return {
        "weights, read once a pass": passes * processes * stored_bytes(size),
        "hidden states, read and written at each layer": 2.0 * run * tokens * size.hidden * width,
    }
