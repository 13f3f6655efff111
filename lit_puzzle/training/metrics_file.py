"""The logged metrics of a run in one CSV file, which a resumed run continues without a gap and without doubled steps.

    step, then the metrics in alphabetical order; a cell is empty where a row does not log that metric

Reads and writes that file. A row is on disk when `append` returns. A metric that was not logged before adds a column:
then the file is written anew, atomically. Disk: 20 bytes a number. Needs no torch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from lit_puzzle.run.files import read_text, write_atomically

STEP = "step"
Row = tuple[int, dict[str, float]]
LARGEST_BYTES = 4 << 30


class MetricsFile:
    """Rows of metrics by step.

    Args:
        path: the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the file, without a last line that a killed run has left half.

        Raises:
            ValueError: it cannot be read, or a line is no row; the message names file and line.
        """
        if not self.path.exists():
            return
        text = read_text(self.path, LARGEST_BYTES)
        whole = text[: text.rfind("\n") + 1]
        for number, cells in enumerate(csv.DictReader(io.StringIO(whole)), start=2):
            try:
                yield int(cells.pop(STEP)), {name: float(cell) for name, cell in cells.items() if cell}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, is damaged: {str(cells)[:60]}. Remove the file; the run then logs "
                    "from where it is."
                ) from error

    def cut(self, step: int) -> None:
        """Keep the rows below a step: what a killed run logged beyond the checkpoint is logged again."""
        self._write([row for row in self.rows() if row[0] < step])

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row."""
        new = set(metrics) - set(self._columns)
        if new:
            self._write([*self.rows(), (step, dict(metrics))])
            return
        with self.path.open("a", encoding="utf-8", newline="") as stream:
            self._writer(stream).writerow({STEP: step, **metrics})

    def _write(self, rows: list[Row]) -> None:
        self._columns = sorted({name for _, metrics in rows for name in metrics})
        text = io.StringIO()
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows({STEP: step, **metrics} for step, metrics in rows)
        write_atomically(self.path, text.getvalue())

    def _writer(self, stream: io.TextIOBase | io.StringIO) -> csv.DictWriter[str]:
        return csv.DictWriter(stream, [STEP, *self._columns], restval="", lineterminator="\n")
