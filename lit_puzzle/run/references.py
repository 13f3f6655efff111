"""References to environment variables in recipes, `${oc.env:NAME}` or `${oc.env:NAME,DEFAULT}`: they stay references.

A run gets the value, which may be a secret; what is written to disk (`config.yaml`, the model card) has the reference.
Reads the environment; writes nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

REFERENCE = re.compile(r"\$\{oc\.env:\s*([^},\s]+)\s*(?:,([^}]*))?\}")
SHORTEST_PART = 6  # a shorter value is hidden only where it is all of a text under the reference's key


class References:
    """The references in the texts of a recipe, and their values.

    Args:
        nodes: layers of the recipe, and overrides as mappings of keys to texts.
    """

    def __init__(self, nodes: Iterable[Any]) -> None:
        self._found = [
            (key, _value(text), text) for node in nodes for key, text in _texts(node, "") if REFERENCE.search(text)
        ]

    def __bool__(self) -> bool:
        return bool(self._found)

    def restore(self, node: Any, key: str = "") -> Any:
        """Return a copy of resolved settings with references in place of their values.

        Args:
            node: the settings.
            key: the key that they stand under.
        """
        if isinstance(node, dict):
            return {name: self.restore(value, str(name)) for name, value in node.items()}
        if isinstance(node, list):
            return [self.restore(value, key) for value in node]
        for own_key, value, text in self._found:
            if value and key == own_key and str(node) == value:
                return text
            if isinstance(node, str) and len(value) >= SHORTEST_PART:
                node = node.replace(value, text)
        return node


def _texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _texts(value, str(name).removesuffix("+"))
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, key)
    elif isinstance(node, str):
        yield key, node


def _value(text: str) -> str:
    """Return a text with the values of its references; a missing variable without a default is empty."""
    return REFERENCE.sub(lambda match: os.environ.get(match[1], (match[2] or "").strip()), text)
