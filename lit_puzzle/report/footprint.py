"""Bytes of `frontier` and `report`: rows of two evaluations, prompts that are drawn again for intervals, and pictures.

    rows of a file   1,000 bytes a row and its columns as they are before compression (texts, above all)
    reading          twice the larger file's columns up to 14 MB, and half of them
    intervals        three numbers of 8 bytes a prompt for `RESAMPLES_AT_A_TIME`, beside both: Arrow keeps what it frees
    pictures         38 MB for the largest; 430 bytes a point of a training's curves while they are drawn, 20 afterwards
    metrics          5 bytes a byte of the largest file while it is read, and 100 bytes for each number that is drawn

The first two are fitted to `scripts/bench/footprint_rows.py`, the last two to `footprint_report.py` there. Pure
functions; imports no torch; reads what files of rows state, which problems they have, and the first lines of metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_puzzle.report.found_runs import files_in
from lit_puzzle.report.request_rates import RESAMPLES_AT_A_TIME
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Phase
from lit_puzzle.run.recipe_values import Values

BYTES_OF_A_ROW = 1000.0  # as objects, without the characters of texts
READING_BYTES = 14e6
SHARE_AT_WORK = 0.5  # of the columns of the file that is read
PICTURE_BYTES = 38e6  # of 36 layers of 128 experts, with matplotlib's fonts
LEFT_BYTES = 8e6  # of all pictures, beside their files
CHARACTER_BYTES, NUMBER_BYTES = 5.0, 20.0  # of a file of metrics, as text and as a stream; of a number in it
POINT_BYTES, DRAWN_POINT_BYTES, PICTURE_BYTES_OF_A_POINT = 100.0, 430.0, 20.0  # read; drawn; in two SVGs
DISK_BYTES_OF_A_POINT = 35.0  # both SVGs, as the page holds them
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
    """Return the footprint of `report`: of the largest files that its folders have, at most three levels below."""
    from lit_puzzle.report.frontier import FRONTIER_FILE  # pyarrow, as above
    from lit_puzzle.report.training_sections import METRICS, MOST_CURVES

    folders = [Path(str(folder)) for folder in values.at("folders")]
    logs = [file for pattern in METRICS for file in files_in(folders, pattern)]
    frontiers = [_compared_sizes(file.parent) for file in files_in(folders, FRONTIER_FILE)]
    is_there = all(folder.is_dir() for folder in folders)
    notes = () if is_there else (f"rows of two evaluations: {_assumption()}",)
    frontiers += [[(0, 0.0)] if is_there else [(ASSUMED_ROWS, ASSUMED_BYTES)] * 2]
    rows = max(map(_rows, frontiers), key=lambda phase: phase.peak_bytes)
    points = sorted((_points(file) for file in logs), reverse=True)[:MOST_CURVES] or [0.0]
    kept = {"pictures so far": PICTURE_BYTES_OF_A_POINT * sum(points)}
    largest = max((file.stat().st_size for file in logs), default=0)
    reading = {"metrics as text": CHARACTER_BYTES * largest, "numbers to draw": POINT_BYTES * points[0]}
    drawing = {"a picture": PICTURE_BYTES, "its curves": DRAWN_POINT_BYTES * points[0]}
    phases = (
        Phase("reading curves", {**reading, "fonts and modules": LEFT_BYTES, **kept}),
        Phase("drawing", drawing | kept),
        Phase("rows", {**rows.parts, "fonts and modules": LEFT_BYTES, **kept}),
    )
    disk = {"page and pictures": 1e7 + DISK_BYTES_OF_A_POINT * sum(points)}
    return Footprint("report", phases, disk=disk, notes=notes)


def _compared_sizes(folder: Path) -> list[tuple[int, float]]:
    """Return rows and columns of the evaluations that a frontier's run compared; none where the stage draws none."""
    from lit_puzzle.environments.row_files import parquet_size
    from lit_puzzle.report.found_runs import DAMAGED
    from lit_puzzle.report.request_sections import compared_rows
    from lit_puzzle.report.run_summary import read_run

    try:
        return [parquet_size(file) for file in compared_rows(read_run(folder))]
    except DAMAGED:  # the stage says so on its page
        return [(0, 0.0)]


def _points(file: Path) -> float:
    """Return how many numbers of a file of metrics are drawn, from its size and the names in its first line."""
    from lit_puzzle.report.training_sections import DRAWN

    with file.open(errors="replace") as stream:
        names = stream.readline().strip().split(",")[1:]  # after `step`
    return file.stat().st_size / NUMBER_BYTES * len(DRAWN.intersection(names)) / max(1, len(names))


def _assumption() -> str:
    return f"{ASSUMED_ROWS:,} rows of {ASSUMED_BYTES / 1e6:.0f} MB are assumed"


def _rows(sizes: Sequence[tuple[int, float]]) -> Phase:
    held = sum(BYTES_OF_A_ROW * rows + columns for rows, columns in sizes)
    larger = max(columns for _, columns in sizes)
    reading = min(READING_BYTES, 2 * larger) + SHARE_AT_WORK * larger
    return Phase("rows", {"rows of both evaluations": held, "reading a file": reading})
