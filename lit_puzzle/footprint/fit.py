"""Whether a stage fits a device, and which setting makes it fit.

A knob is a key of the recipe with other values; the footprint is computed again with each, least painful first. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lit_puzzle.run.footprint import GIB, Device, Footprint
from lit_puzzle.run.recipe_values import Values

MORE_DEVICES = (2, 4, 8, 16, 32, 64)


def fits(footprint: Footprint, device: Device) -> bool:
    """Return whether the fullest phase fits what a process may use, and the stage does not refuse its own settings."""
    return not footprint.refusals and footprint.peak_bytes <= device.usable_bytes


def with_value(values: Values, key: str, value: Any) -> Values:
    """Return the values of a recipe with another one at a dotted key."""
    return Values(_changed(values.content, key.split("."), value), values.place)


def _changed(node: Any, keys: Sequence[str], value: Any) -> Any:
    if not keys:
        return value
    if isinstance(node, list):
        place = int(keys[0])
        return [_changed(item, keys[1:], value) if index == place else item for index, item in enumerate(node)]
    inside = node if isinstance(node, Mapping) else {}
    return {**inside, keys[0]: _changed(inside.get(keys[0]), keys[1:], value)}


def advice(
    footprint: Footprint, values: Values, device: Device, compute: Callable[[Values, Device], Footprint]
) -> list[str]:
    """Return, for a stage that does not fit, the settings that make it fit alone, and how many devices would.

    Args:
        footprint: of the recipe as it is.
        values: of the recipe.
        device: that it does not fit.
        compute: footprint of other values or devices.
    """
    if footprint.refusals:
        return list(footprint.refusals)
    found = list(_knobs(footprint, values, device, compute))
    for count in MORE_DEVICES:
        more = Device(device.name, device.kind, count, device.memory_bytes)
        if device.kind == "cuda" and count > device.count and fits(compute(values, more), more):
            found.append(f"{count} {device.name} in place of {device.count}: fits")
            break
    return found or ["no single setting makes it fit; combine several, or use devices with more memory"]


def _knobs(
    footprint: Footprint, values: Values, device: Device, compute: Callable[[Values, Device], Footprint]
) -> Iterator[str]:
    for knob in footprint.knobs:
        for value in knob.values:
            changed = compute(with_value(values, knob.key, value), device)
            if fits(changed, device):
                inside_list = any(part.isdigit() for part in knob.key.split("."))
                word = f"in the recipe: {knob.key}" if inside_list else f"--{knob.key}={_shown(value)}"
                yield f"{knob.what.format(_shown(knob.now))}: fits at {_shown(value)} ({word})"
                break
        else:
            if knob.values:
                least = compute(with_value(values, knob.key, knob.values[-1]), device).peak_bytes / GIB
                if least < 0.98 * footprint.peak_bytes / GIB:
                    end = _shown(knob.values[-1])
                    yield f"{knob.what.format(knob.now)}: {least:,.1f} GiB at {end}, not enough alone"


def _shown(value: Any) -> str:
    return "all" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def refusal(footprint: Footprint, device: Device, found: list[str]) -> str:
    """Return the message of a run that cannot fit."""
    if footprint.refusals:
        return " ".join(footprint.refusals)
    phase, processes = footprint.fullest, f" in each of {device.count} processes" if device.count > 1 else ""
    return (
        f"{footprint.stage} needs {phase.peak_bytes / GIB:,.1f} GiB{processes} ({phase.name}: "
        f"{_largest(phase.parts)}); "
        f"{device.usable_bytes / GIB:,.1f} GiB are there. {'; '.join(found)}. --force starts it all the same."
    )


def _largest(parts: Mapping[str, float]) -> str:
    top = sorted(parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {count / GIB:,.1f}" for name, count in top)
