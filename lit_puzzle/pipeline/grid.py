"""Stages that stand for many: an entry with the key `each` becomes one entry for every combination of its values.

    - recipe: search.yaml
      name: search-{solver}-{seed}
      each:
        solver: {mip: {}, greedy: {solver.name: greedy}}    # a name -> overrides of the stage
        seed: [0, 1, 2]                                      # names alone
      overrides: {scores: "runs/score-{seed}"}

A name in braces is replaced in `name` and in `overrides`; a text that is nothing else becomes the value itself, so that
"{seed}" is a number. Overrides of a value are on top of those of the stage. Pure functions; reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

PLACEHOLDER = re.compile(r"\{(\w+)\}")


def expanded(entry: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the entries that an entry of a pipeline stands for, in the order of its values, the last one fastest.

    Args:
        entry: as the recipe has it.
        where: which entry, for messages.

    Raises:
        ValueError: `each` is no mapping of names to values, a placeholder of no such name, or a `name` without one of
            them, which would give two stages the same folder.
    """
    if "each" not in entry:
        return [dict(entry)]
    each, rest = entry["each"], {key: value for key, value in entry.items() if key != "each"}
    if not isinstance(each, Mapping) or not each or not all(_is_valid(*pair) for pair in each.items()):
        raise ValueError(
            f"{where}: each is {each!r}; a mapping of names to lists that are not empty, or to values with mappings of "
            "overrides, is needed."
        )
    name = str(rest.get("name", ""))
    missing = [key for key in each if f"{{{key}}}" not in name]
    if missing:
        raise ValueError(f"{where}: name is {name!r}; it needs {{{missing[0]}}}, so that every stage has a folder.")
    found = []
    for values in product(*each.values()):
        chosen = dict(zip(each, values, strict=True))
        made = _filled(rest, chosen, where)
        for key, value in chosen.items():
            if isinstance(each[key], Mapping):
                made["overrides"] = {**(made.get("overrides") or {}), **_filled(each[key][value] or {}, chosen, where)}
        found.append(made)
    return found


def _is_valid(key: Any, values: Any) -> bool:
    """Return whether a name has values, and these, in a mapping, have overrides or nothing."""
    if not isinstance(key, str) or not isinstance(values, list | Mapping) or not values:
        return False
    return isinstance(values, list) or all(isinstance(values[name], Mapping | None) for name in values)


def _filled(node: Any, chosen: Mapping[str, Any], where: str) -> Any:
    """Return nested values with every placeholder replaced."""
    if isinstance(node, Mapping):
        return {_filled(key, chosen, where): _filled(value, chosen, where) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(item, chosen, where) for item in node]
    if not isinstance(node, str):
        return node
    unknown = sorted(set(PLACEHOLDER.findall(node)) - set(chosen))
    if unknown:
        raise ValueError(f"{where}: {node!r} names {{{unknown[0]}}}; each has {', '.join(chosen)}.")
    whole = PLACEHOLDER.fullmatch(node)
    return chosen[whole[1]] if whole else PLACEHOLDER.sub(lambda match: str(chosen[match[1]]), node)
