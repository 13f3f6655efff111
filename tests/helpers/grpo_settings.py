"""Settings of GRPO for tests: a copy with some fields changed, each where it belongs."""

import dataclasses
from typing import Any

from lit_puzzle.rl.settings import GRPOSettings


def change(settings: GRPOSettings, **fields: Any) -> GRPOSettings:
    """Fields of `sampling` and `loss` are given by their own names; an unknown one is a TypeError."""
    for name in ("sampling", "loss"):
        part = vars(settings)[name]
        own = {field.name for field in dataclasses.fields(part)} & fields.keys()
        fields[name] = dataclasses.replace(part, **{field: fields.pop(field) for field in own})
    return dataclasses.replace(settings, **fields)
