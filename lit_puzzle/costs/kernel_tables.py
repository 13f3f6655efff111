"""Tables of measured GPU kernels: find them, read the rows that a setting needs, interpolate between them.

Reads the Parquet files of the PyPI package `aiconfigurator-core` (0.12.0, Apache-2.0, NVIDIA; extra `gpu-tables`) under
`aiconfigurator_core/systems/data/<system>/<kernel>/<framework>/<version>/`, through pyarrow with filters, without
importing the package. Latencies there are milliseconds; here everything is seconds. Every file is read once per
process for each set of filters: 0.1 to 0.3 s and a few MB for one deployment of one GPU.

    between measured points   linear: a kernel's time is a launch plus traffic or arithmetic, both linear in each size
    outside of them           ValueError that names table and range; `attention_laws`, `kernel_laws` extrapolate

Source: aiconfigurator-core 0.12.0; vLLM 0.24.0 measured on H100, H200, B200, vLLM 0.14.0 on A100 (no newer one there).
"""

from __future__ import annotations

import functools
import importlib.util
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Filter = tuple[str, str, Any]


@dataclass(frozen=True)
class System:
    """Where the tables of one GPU are.

    Attributes:
        folder: folder of its system.
        vllm: version of vLLM that was measured.
        nccl: version of NCCL that was measured.
        mxfp8_experts: engine and version in which FlashInfer's product of MXFP4 experts with MXFP8 inputs was measured;
            vLLM uses that kernel with `VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8=1`, where it has no table of its own.
    """

    folder: str
    vllm: str
    nccl: str
    mxfp8_experts: str | None = None


SYSTEMS = {
    "H100": System("h100_sxm", "0.24.0", "2.29.2"),
    "H200": System("h200_sxm", "0.24.0", "2.29.2"),
    "B200": System("b200_sxm", "0.24.0", "2.29.2", "sglang/0.5.14"),
    "A100": System("a100_sxm", "0.14.0", "2.27.3"),
}


@dataclass(frozen=True)
class Curve:
    """Seconds measured at ascending sizes.

    Attributes:
        table: the table that the points are from, for error messages.
        size: what the sizes count, for error messages.
        sizes: measured sizes, ascending.
        seconds: measured seconds, one per size.
    """

    table: str
    size: str
    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, table: str, size: str, points: dict[float, float]) -> Curve:
        """Make the curve through points of size and milliseconds.

        Raises:
            ValueError: there are no points.
        """
        if not points:
            raise ValueError(f"{table} has no such rows; choose dtypes, parallelism and a GPU that were measured")
        sizes = tuple(sorted(points))
        return cls(table, size, sizes, tuple(points[size] / 1e3 for size in sizes))

    def at(self, size: float) -> float:
        """Return the seconds at `size`, linear between its measured neighbors.

        Raises:
            ValueError: `size` is outside the measured range.
        """
        right = bisect_left(self.sizes, size)
        if right == len(self.sizes) or (right == 0 and size < self.sizes[0]):
            raise ValueError(
                f"{self.table}: {self.size} {size:g} is outside the measured {self.sizes[0]:g}..{self.sizes[-1]:g}"
            )
        if self.sizes[right] == size:
            return self.seconds[right]
        low, high = self.sizes[right - 1], self.sizes[right]
        share = (size - low) / (high - low)
        return self.seconds[right - 1] + share * (self.seconds[right] - self.seconds[right - 1])

    def last_slope(self) -> float:
        """Return the seconds per size between the last two measured points, at least 0; 0 for a single point."""
        if len(self.sizes) < 2:
            return 0.0
        return max(0.0, (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2]))


def mix(parts: Sequence[tuple[float, Curve]]) -> Curve:
    """Return the weighted sum of curves, at the sizes that all of them were measured at.

    Raises:
        ValueError: they have no size in common.
    """
    first = parts[0][1]
    shared = sorted(set.intersection(*(set(curve.sizes) for _, curve in parts)))
    if not shared:
        raise ValueError(f"{first.table}: no {first.size} was measured in all neighboring rows")
    seconds = tuple(sum(weight * curve.at(size) for weight, curve in parts) for size in shared)
    return Curve(first.table, first.size, tuple(shared), seconds)


def neighbors(grid: Sequence[float], value: float) -> list[tuple[float, float]]:
    """Return the grid values around `value` with their weights in a linear interpolation; one value on the grid.

    Args:
        grid: ascending values; the caller has checked that `value` is within them.
        value: where to interpolate.
    """
    right = bisect_left(grid, value)
    if grid[right] == value:
        return [(grid[right], 1.0)]
    low, high = grid[right - 1], grid[right]
    share = (value - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def find_system(gpu: str) -> System:
    """Return where the tables of `gpu` are.

    Raises:
        ValueError: the GPU was not measured.
    """
    if gpu not in SYSTEMS:
        raise ValueError(
            f"no measured kernels for GPU {gpu!r}; allowed: {sorted(SYSTEMS)}; for others use the roofline"
        )
    return SYSTEMS[gpu]


def data_folder() -> Path:
    """Return the folder of all tables.

    Raises:
        ValueError: the package with the tables, or pyarrow, is not installed.
    """
    package = importlib.util.find_spec("aiconfigurator_core")
    if package is None or package.origin is None or importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            "measured kernels need the packages aiconfigurator-core and pyarrow; install the extra: "
            "pip install 'lit-puzzle[gpu-tables]', or use the roofline"
        )
    return Path(package.origin).parent / "systems" / "data"


@functools.cache
def read_rows(path: str, columns: tuple[str, ...], filters: tuple[Filter, ...]) -> list[tuple[Any, ...]]:
    """Read rows of one table: the values of `columns`, then the latency in milliseconds.

    Raises:
        ValueError: there is no such table, or it lacks a column.
    """
    file = data_folder() / path
    if not file.is_file():
        raise ValueError(f"no table {path} in {data_folder()}; this kernel was not measured on this GPU")
    import pyarrow.parquet as parquet

    names = set(parquet.read_schema(file).names)
    missing = sorted({*columns, *(name for name, _, _ in filters)} - names)
    if missing:
        raise ValueError(f"table {path} has no columns {missing}: this kernel was not measured on this GPU")
    table = parquet.read_table(file, columns=[*columns, "latency"], filters=list(filters))
    return list(zip(*(table[name].to_pylist() for name in (*columns, "latency")), strict=True))


def measured_dtype(known: dict[str, str], what: str, dtype: str) -> str:
    """Return the tables' name of a number format.

    Args:
        known: number formats that were measured, and the tables' names for them.
        what: key of the scenario, for the error message.
        dtype: the number format.

    Raises:
        ValueError: no kernel was measured with it.
    """
    if dtype not in known:
        raise ValueError(f"no measured kernels with {what} {dtype!r}; allowed: {sorted(known)}")
    return known[dtype]
