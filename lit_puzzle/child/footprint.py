"""Bytes of `assemble`: headers, one trained tensor and a buffer; the disk is the child's.

Pure functions; imports no torch; reads `config.json`.
"""

from __future__ import annotations

from lit_puzzle.model.footprint import model_size, stored_bytes
from lit_puzzle.model.planned_shape import planned_child, planned_config
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Phase
from lit_puzzle.run.recipe_values import Values

BUFFER = 16 * 2**20  # of copies from file to file
BYTES_OF_A_HEADER = 1000  # of a tensor


def copying_bytes(layers: int) -> dict[str, float]:
    """Return what copying a checkpoint from file to file holds."""
    return {"buffer": float(BUFFER), "headers": float(BYTES_OF_A_HEADER * 20 * layers)}


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `assemble`."""
    parent = planned_config(values.path("parent"))
    manual = values.get("manual") or {}
    config, note = planned_child(parent.config, manual) if manual.get("experts") or manual.get("windows") else (
        parent.config, "the child: at most the size of its parent")  # fmt: skip
    size = model_size(config)
    held = copying_bytes(len(size.layers))
    if values.get("library") is not None:
        held["one trained tensor"] = 4.0 * size.hidden * max(size.queries, size.inner)
    return Footprint(
        "assemble",
        (Phase("copy", held),),
        disk={"child": stored_bytes(size)},
        notes=(parent.assumed, note),
    )
