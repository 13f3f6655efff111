"""The results of a run as tables of text: `accuracy/low/before` is column `accuracy`, row `low/before`.

A result and its standard error (`a/b_se`, or `a_se/b`) share a cell. Keys without a slash come first, in lines. Columns
with rows in common share a table. Reads and writes nothing.
"""

from collections.abc import Mapping
from typing import Any

WIDTH = 100  # of a line

Table = dict[str, dict[str, str]]  # column -> row -> cell


def results_text(results: Mapping[str, Any]) -> list[str]:
    """Return lines with every result.

    Args:
        results: key -> number or text.
    """
    errors = {key: error for key in results if (error := _error_key(key, results))}
    cells = {
        key: number_text(value) + (f" ± {number_text(results[errors[key]])}" if key in errors else "")
        for key, value in results.items()
        if key not in errors.values()
    }
    plain = [f"{key} {cell}" for key, cell in cells.items() if "/" not in key]
    lines = _wrapped(plain)
    for table in _tables({key: cell for key, cell in cells.items() if "/" in key}):
        lines += _table_lines(table)
    return lines


def number_text(value: object) -> str:
    """Return a number with four digits, whole numbers with all; anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _error_key(key: str, results: Mapping[str, Any]) -> str | None:
    """Return the key of a result's standard error."""
    first, slash, rest = key.partition("/")
    return next((name for name in (f"{key}_se", f"{first}_se{slash}{rest}") if name in results), None)


def _wrapped(parts: list[str]) -> list[str]:
    """Join short texts to lines."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 3 <= WIDTH:
            lines[-1] += f"   {part}"
        else:
            lines.append(part)
    return lines


def _tables(cells: Mapping[str, str]) -> list[Table]:
    """Distribute cells among tables; a column joins the first one that has one of its rows."""
    columns: Table = {}
    for key, cell in cells.items():
        column, _, row = key.partition("/")
        columns.setdefault(column, {})[row] = cell
    tables: list[Table] = []
    for column, rows in columns.items():
        fitting = (table for table in tables if any(rows.keys() & other.keys() for other in table.values()))
        table = next(fitting, None)
        if table is None:
            tables.append({column: rows})
        else:
            table[column] = rows
    return tables


def _table_lines(table: Table) -> list[str]:
    """Return a table as lines, a group of columns after the other where they do not fit side by side."""
    rows = list(dict.fromkeys(row for cells in table.values() for row in cells))
    first = max(map(len, rows))
    widths = {column: max(len(column), *map(len, cells.values())) for column, cells in table.items()}
    lines: list[str] = []
    left = list(table)
    while left:
        shown = [left.pop(0)]
        while left and first + sum(widths[column] + 3 for column in [*shown, left[0]]) <= WIDTH:
            shown.append(left.pop(0))
        lines.append(_row("", shown, first, [widths[column] for column in shown]))
        for row in rows:
            cells = [table[column].get(row, "") for column in shown]
            if any(cells):
                lines.append(_row(row, cells, first, [widths[column] for column in shown]))
    return lines


def _row(label: str, cells: list[str], first: int, widths: list[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "   ".join([label.ljust(first), *padded]).rstrip()
