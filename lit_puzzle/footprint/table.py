"""Prints a plan: what each device holds in every phase, disk, network, hours, and what to turn if it does not fit."""

from __future__ import annotations

import json
import math

from lit_puzzle.footprint.hours import DISK_BYTES_PER_SECOND, disk_seconds, efforts, network_seconds, total_seconds
from lit_puzzle.footprint.plan import Plan
from lit_puzzle.run.footprint import GIB, Phase

UNITS = ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"))


def shown_bytes(count: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for size, unit in UNITS:
        if count >= size or unit == "MiB":
            return f"{count / size:,.1f} {unit}" if count >= size / 10 else "< 0.1 MiB"
    raise AssertionError("MiB is last")


def shown_seconds(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if math.isinf(seconds):
        return "does not fit"
    for size, unit in ((172_800.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= size:
            return f"{seconds / (86_400 if unit == 'days' else size):,.1f} {unit}"
    return f"{seconds:,.1f} seconds"


def _row(name: str, value: str, indent: int = 2) -> str:
    return f"{' ' * indent}{name:<{54 - indent}} {value:>14}"


def _phase(phase: Phase) -> list[str]:
    rows = sorted(phase.parts.items(), key=lambda item: -item[1])
    return [_row(phase.name, shown_bytes(phase.peak_bytes)), *(_row(n, shown_bytes(v), 4) for n, v in rows if v > 0)]


def plan_lines(plan: Plan) -> list[str]:
    """Return the lines of a plan's table."""
    made, device = plan.footprint, plan.device
    where = f"{device.count} x {device.name}" if device.kind == "cuda" else f"{device.count} CPU process(es)"
    lines = [f"{plan.recipe}: {made.stage} on {where}, {shown_bytes(device.usable_bytes)} usable each"]
    lines.append("memory of each device")
    for phase in sorted(made.phases, key=lambda phase: -phase.peak_bytes):
        lines += _phase(phase)
    for title, parts in (
        ("host memory of each process", made.host if device.kind == "cuda" else {}),
        ("disk", made.disk),
        ("from and to disk, in the whole run", made.traffic),
        ("network, received by each device", made.network),
    ):
        found = [_row(name, shown_bytes(count)) for name, count in parts.items() if count > 0]
        lines += [title, *found] if found else []
    lines += _times(plan)
    lines += [f"assumed: {note}" for note in made.notes if note]
    verdict = "fits" if not plan.advice else "DOES NOT FIT"
    lines.append(f"peak {shown_bytes(made.peak_bytes)} ({made.fullest.name}): {verdict}")
    return lines + [f"  {line}" for line in plan.advice]


def _times(plan: Plan) -> list[str]:
    made, device = plan.footprint, plan.device
    if not made.works:
        return []
    lines = ["arithmetic"]
    for name, effort in efforts(made, device).items():
        lines.append(_row(f"{name}: {effort.flops:.3g} FLOPs", shown_seconds(effort.seconds)))
    if made.network:
        lines.append(_row("network, at the speed of its links", shown_seconds(network_seconds(made, device))))
    if made.traffic:
        speed = f"disk, at {DISK_BYTES_PER_SECOND / 1e9:g} GB a second"
        lines.append(_row(speed, shown_seconds(disk_seconds(made))))
    return [*lines, _row("together", shown_seconds(total_seconds(made, device)))]


def short_line(plan: Plan) -> str:
    """Return a plan in one line, as a run prints it first."""
    made, device = plan.footprint, plan.device
    disk = sum(made.disk.values())
    return (
        f"plan: {shown_bytes(made.peak_bytes)} of {shown_bytes(device.usable_bytes)} in each of {device.count} "
        f"process(es) ({made.fullest.name}), {shown_bytes(disk)} of disk; --plan says more"
    )


def plan_json(plan: Plan) -> str:
    """Return a plan as JSON."""
    return json.dumps(plan.to_json(), indent=2)
