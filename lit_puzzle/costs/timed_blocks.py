"""Kernel times of blocks that were timed on the machine at hand, interpolated between the measured points.

Reads the JSON table of `scripts/measure_blocks.py`. Writes nothing and needs no torch. The table holds

    decode_layer   window, experts, batch size, context  -> seconds of one decode step of one layer
    prefill_layer  window, experts, prompt tokens        -> seconds to read one prompt through one layer
    decode_rest    batch size                            -> seconds of a step outside the layers
    prefill_rest   prompt tokens                         -> seconds outside the layers to read one prompt

Each window must have been measured itself; on the other axes seconds are linear between measured points, and a value
outside them is a ValueError. Linear interpolation overestimates prefill attention, which is quadratic: by 1/8 half-way
between n and 2n tokens where nothing else counts, so measure prompt lengths that are closer together. The time of a
window does not change with contexts beyond it. The timed code is transformers' own, one prompt at a time, without
chunks: the engine's `chunk_tokens` and `step.overhead_seconds` are not used.

Source: arXiv 2411.19146 (every block's runtime is measured on the target hardware).
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Block, Setting
from lit_puzzle.run.files import read_json

AXES: dict[str, tuple[str, ...]] = {
    "decode_layer": ("num_experts", "batch_size", "context_tokens"),
    "prefill_layer": ("num_experts", "prompt_tokens"),
    "decode_rest": ("batch_size",),
    "prefill_rest": ("prompt_tokens",),
}
OPTIONS = {
    "num_experts": "experts",
    "batch_size": "batches",
    "context_tokens": "contexts",
    "prompt_tokens": "prompts",
    "window_tokens": "windows",
}  # axis -> option of scripts/measure_blocks.py
HEADER = ("gpu", "dtype", "model", "fingerprint", "command", "hardware", "versions", "settings")

Point = tuple[int, ...]
Grids = dict[str, dict[int | None, "Grid"]]  # kind -> window (None where there is none) -> measured points


def shape_fingerprint(model: ModelShape) -> str:
    """Return what identifies a model shape: the first 16 digits of the SHA-256 of its sizes."""
    return hashlib.sha256(json.dumps(model.to_json(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Grid:
    """Seconds at every combination of some values on each axis.

    Attributes:
        axes: ascending values of each axis.
        seconds: seconds at every combination of them.
    """

    axes: tuple[tuple[int, ...], ...]
    seconds: Mapping[Point, float]

    def at(self, point: Sequence[float]) -> float:
        """Interpolate linearly on every axis; every coordinate must lie within its axis."""
        corners: list[tuple[Point, float]] = [((), 1.0)]
        for axis, value in zip(self.axes, point, strict=True):
            right = min(bisect.bisect_left(axis, value), len(axis) - 1)
            left = right if axis[right] == value else right - 1
            share = 0.0 if left == right else (value - axis[left]) / (axis[right] - axis[left])
            ends = ((axis[left], 1 - share), (axis[right], share))
            corners = [((*at, end), weight * part) for at, weight in corners for end, part in ends if part]
        return sum(weight * self.seconds[at] for at, weight in corners)


@dataclass(frozen=True)
class TimedBlocks:
    """A `KernelTimes` from the table of one machine, one dtype and one model shape.

    Args:
        table: the JSON file of `scripts/measure_blocks.py`.

    Raises:
        ValueError: the file is missing, malformed, or lacks combinations of measured values.
    """

    name: ClassVar[str] = "timed_blocks"
    table: Path
    model: ModelShape = field(init=False, repr=False, compare=False)
    header: dict[str, Any] = field(init=False, repr=False, compare=False)
    grids: Grids = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", Path(self.table))
        data = _read(self.table)
        object.__setattr__(self, "header", {key: data[key] for key in HEADER})
        object.__setattr__(self, "model", ModelShape.from_json(data["model"]))
        object.__setattr__(self, "grids", {kind: _grids(self.table, kind, data[kind]) for kind in AXES})

    def check(self, setting: Setting) -> None:
        """Check that the setting is the one that was timed.

        Raises:
            ValueError: it has another model, device, number format or parallelism, or sizes that were not measured.
        """
        self._check_model(setting.model)
        scenario, deployment = setting.scenario, setting.deployment
        if deployment.tensor_parallel > 1 or deployment.expert_parallel > 1:
            raise ValueError(
                f"{self.table} was timed on one device; the deployment has tensor_parallel "
                f"{deployment.tensor_parallel} and expert_parallel {deployment.expert_parallel}. Set tensor_parallel: "
                "1 in the scenario (more GPUs are then more replicas), or use another source of times."
            )
        given = {
            "weight_dtype": scenario.weight_dtype,
            "expert_dtype": scenario.expert_dtype,
            "kv_dtype": scenario.kv_dtype,
        }
        if scenario.gpu != self.header["gpu"] or set(given.values()) != {self.header["dtype"]}:
            raise ValueError(
                f"{self.table} was timed on {self.header['gpu']!r} in {self.header['dtype']}; the scenario says gpu "
                f"{scenario.gpu!r} and {given}. Change the scenario, or time the blocks there: "
                f"{self.header['command']}"
            )
        first, last = float(scenario.prompt_tokens), float(scenario.total_tokens)
        for window, grid in self.grids["decode_layer"].items():
            for context in (first, last):
                self._within("decode_layer", window, grid, {"context_tokens": min(context, window or context)})
        if scenario.prompt_tokens:
            self._within("prefill_rest", None, self.grids["prefill_rest"][None], {"prompt_tokens": first})
        if scenario.batch_size is not None:
            self._within("decode_rest", None, self.grids["decode_rest"][None], {"batch_size": scenario.batch_size})

    def decode_layer(self, setting: Setting, block: Block, batch_size: int, context_tokens: float) -> float:
        """Return the seconds of one decode step of one layer."""
        context = min(context_tokens, block.window_tokens or context_tokens)
        point = {"num_experts": block.num_experts, "batch_size": batch_size, "context_tokens": context}
        return self._seconds("decode_layer", setting, block.window_tokens, point)

    def prefill_layer(self, setting: Setting, block: Block, prompt_tokens: int) -> float:
        """Return the seconds to read one prompt through one layer."""
        point = {"num_experts": block.num_experts, "prompt_tokens": prompt_tokens}
        return self._seconds("prefill_layer", setting, block.window_tokens, point)

    def decode_rest(self, setting: Setting, batch_size: int) -> float:
        """Return the seconds of one decode step outside the layers: embedding, masks, rotation, norm, head, argmax."""
        return self._seconds("decode_rest", setting, None, {"batch_size": batch_size})

    def prefill_rest(self, setting: Setting, prompt_tokens: int) -> float:
        """Return the seconds outside the layers to read one prompt; the head sees its last token only."""
        return self._seconds("prefill_rest", setting, None, {"prompt_tokens": prompt_tokens})

    def _seconds(self, kind: str, setting: Setting, window: int | None, point: Mapping[str, float]) -> float:
        self._check_model(setting.model)
        grids = self.grids[kind]
        if window not in grids:
            raise ValueError(
                f"{self.table}: {kind} was measured for windows {_listed(grids)}, not for {window}. Extend it: "
                f"{self._command('window_tokens', window)}"
            )
        self._within(kind, window, grids[window], point)
        return grids[window].at(tuple(point.values()))

    def _within(self, kind: str, window: int | None, grid: Grid, point: Mapping[str, float]) -> None:
        """Raise ValueError for a coordinate outside its measured axis."""
        for name, value in point.items():
            axis = grid.axes[AXES[kind].index(name)]
            if not axis[0] <= value <= axis[-1]:
                wanted = math.floor(value) if value < axis[0] else math.ceil(value)
                too_large = name == "batch_size" and value > axis[0]
                hint = f", or set costs.engine.max_sequences to {axis[-1]}" if too_large else ""
                raise ValueError(
                    f"{self.table}: {kind} (window {_text(window)}) was measured for {name} {axis[0]} to {axis[-1]}, "
                    f"not for {value:g}. Extend it{hint}: {self._command(name, wanted)}"
                )

    def _command(self, axis: str, value: int | None) -> str:
        """Return the command that makes the table again with one more value on an axis."""
        words = str(self.header["command"]).split()
        start = words.index(f"--{OPTIONS[axis]}") + 1
        end = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
        return " ".join([*words[:end], _text(value), *words[end:]])

    def _check_model(self, model: ModelShape) -> None:
        if model == self.model:
            return
        timed, given = self.model.to_json(), model.to_json()
        other = {key: (timed[key], given[key]) for key in given if timed[key] != given[key]}
        if other:
            raise ValueError(
                f"{self.table} was timed for a model of another shape; (timed, given): {other}. Time this model's "
                "blocks: python scripts/measure_blocks.py --config PARENT/config.json --out FILE"
            )


def _read(file: Path) -> dict[str, Any]:
    remedy = "make it with python scripts/measure_blocks.py --config PARENT/config.json --out FILE"
    if not file.is_file():
        raise ValueError(f"no table of timed blocks at {file}; {remedy}")
    try:
        data = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    keys = {*HEADER, *AXES, "whole_model"}
    if set(data) != keys:
        raise ValueError(f"{file}: a table of timed blocks has the keys {sorted(keys)}, not {sorted(data)}; {remedy}")
    try:
        model = ModelShape.from_json(data["model"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {remedy}") from error
    if shape_fingerprint(model) != data["fingerprint"]:
        raise ValueError(f"{file}: model and fingerprint do not match, the file was changed; {remedy}")
    return data


def _grids(file: Path, kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[int | None, Grid]:
    """Make one complete grid for every window in the rows of a kind."""
    points: dict[int | None, dict[Point, float]] = {}
    keys = {*AXES[kind], "seconds"} | ({"window_tokens"} if kind.endswith("layer") else set())
    for row in rows:
        if set(row) != keys:
            raise ValueError(f"{file}: a row of {kind} has the keys {sorted(keys)}, not {dict(row)}")
        seconds = row["seconds"]
        if not isinstance(seconds, float) or not 0 < seconds < math.inf:
            raise ValueError(f"{file}: {kind} has a row whose seconds are not positive: {dict(row)}")
        points.setdefault(row.get("window_tokens"), {})[tuple(row[axis] for axis in AXES[kind])] = seconds
    grids = {}
    for window, measured in points.items():
        axes = tuple(tuple(sorted(set(values))) for values in zip(*measured, strict=True))
        if math.prod(map(len, axes)) != len(measured):
            raise ValueError(
                f"{file}: {kind} (window {_text(window)}) lacks combinations of {dict(zip(AXES[kind], axes))}"
            )
        grids[window] = Grid(axes, measured)
    if not grids:
        raise ValueError(f"{file}: {kind} has no measured point; run scripts/measure_blocks.py again")
    return grids


def _text(value: int | None) -> str:
    return "none" if value is None else str(value)


def _listed(windows: Mapping[int | None, object]) -> list[str]:
    return [_text(window) for window in windows]
