"""Bytes of `frontier` and `report`: the rows of two evaluations, and prompts that are drawn again for intervals.

    rows of a file   1,000 bytes a row and its columns as they are before compression (texts, above all)
    reading          twice the larger file's columns up to 14 MB, and half of them
    intervals        three numbers of 8 bytes a prompt for `RESAMPLES_AT_A_TIME`, beside both: Arrow keeps what it frees

The first two are fitted to `scripts/bench/footprint_rows.py`. Pure functions; imports no torch; reads what files of
rows state, and which problems they have.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_puzzle.report.request_rates import RESAMPLES_AT_A_TIME
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Phase
from lit_puzzle.run.recipe_values import Values

BYTES_OF_A_ROW = 1000.0  # as objects, without the characters of texts
READING_BYTES = 14e6
SHARE_AT_WORK = 0.5  # of the columns of the file that is read
ASSUMED_ROWS, ASSUMED_BYTES = 10_000, 100e6  # of a file that is not there yet: answers of 10,000 characters


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `frontier`."""
    from lit_puzzle.environments.episodes import EPISODES_FILE  # pyarrow takes as long as all other plans
    from lit_puzzle.environments.row_files import distinct_rows, parquet_size

    files = [values.path(name) / EPISODES_FILE for name in ("parent", "child")]
    notes = tuple(f"{file} is not there: {_assumption()}" for file in files if not file.is_file())
    sizes = [parquet_size(file) if file.is_file() else (ASSUMED_ROWS, ASSUMED_BYTES) for file in files]
    prompts = distinct_rows(files[0], ("environment", "problem")) if files[0].is_file() else ASSUMED_ROWS
    drawn = 3.0 * 8 * RESAMPLES_AT_A_TIME * prompts
    rows = _rows(sizes)
    intervals = Phase("intervals", {**rows.parts, "prompts drawn again": drawn})
    return Footprint("frontier", (rows, intervals), disk={"frontier": 1e6}, notes=notes)


def report_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `report`: the rows of parent and child, of which completions are shown."""
    phase, note = _rows([(ASSUMED_ROWS, ASSUMED_BYTES)] * 2), f"rows of two evaluations: {_assumption()}"
    return Footprint("report", (phase,), disk={"page and pictures": 1e7}, notes=(note,))


def _assumption() -> str:
    return f"{ASSUMED_ROWS:,} rows of {ASSUMED_BYTES / 1e6:.0f} MB are assumed"


def _rows(sizes: Sequence[tuple[int, float]]) -> Phase:
    held = sum(BYTES_OF_A_ROW * rows + columns for rows, columns in sizes)
    larger = max(columns for _, columns in sizes)
    reading = min(READING_BYTES, 2 * larger) + SHARE_AT_WORK * larger
    return Phase("rows", {"rows of both evaluations": held, "reading a file": reading})
