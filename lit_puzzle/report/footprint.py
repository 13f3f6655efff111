"""Bytes of `frontier` and `report`: the rows of two evaluations, and what is drawn.

Pure functions; imports no torch; reads the size of the files of rows.
"""

from __future__ import annotations

from lit_puzzle.environments.episodes import EPISODES_FILE
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Phase
from lit_puzzle.run.recipe_values import Values

BYTES_OF_A_BYTE = 4.0  # of a file of rows, once it is read
ASSUMED_BYTES = 100e6  # of a file that is not there yet


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `frontier`."""
    files = [values.path(name) / EPISODES_FILE for name in ("parent", "child")]
    sizes = [float(file.stat().st_size) if file.is_file() else ASSUMED_BYTES for file in files]
    missing = [f"{file} is not there: {ASSUMED_BYTES / 1e6:.0f} MB are assumed" for file in files if not file.is_file()]
    phase = Phase("rows", {"rows of both evaluations": BYTES_OF_A_BYTE * sum(sizes)})
    return Footprint("frontier", (phase,), disk={"frontier": 1e6}, notes=tuple(missing))


def report_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `report`: the rows of parent and child, of which completions are shown."""
    phase = Phase("rows", {"rows of both evaluations": 2 * BYTES_OF_A_BYTE * ASSUMED_BYTES})
    note = f"rows of two evaluations: {ASSUMED_BYTES / 1e6:.0f} MB each are assumed"
    return Footprint("report", (phase,), disk={"page and pictures": 1e7}, notes=(note,))
