"""A tiny parent on disk for passes that read it layer by layer, and runs that are killed inside a layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_puzzle.model import layer_pass

ENOUGH_GIB = 64.0  # with room for two layers


class Killed(BaseException):
    """Stands for kill -9: nothing in the package catches it."""


def stop_at(monkeypatch: Any, layer: int) -> None:
    """Stop every pass while it runs this layer; whatever it has written stays, as after kill -9."""
    run = layer_pass.LayerAtWork.run

    def stopping(self: Any, index: int) -> None:
        run(self, index)
        if self.layer == layer:
            raise Killed

    monkeypatch.setattr(layer_pass.LayerAtWork, "run", stopping)


def layers_run(monkeypatch: Any) -> list[int]:
    """Return a list to which every pass appends the layers that it runs."""
    seen: list[int] = []
    run: Callable[..., None] = layer_pass.LayerAtWork.run

    def counted(self: Any, index: int) -> None:
        if index == 0:
            seen.append(self.layer)
        run(self, index)

    monkeypatch.setattr(layer_pass.LayerAtWork, "run", counted)
    return seen


def same_files(one: Path, other: Path) -> bool:
    """Return whether two files have the same bytes."""
    return one.read_bytes() == other.read_bytes()


def equal(left: Any, right: Any) -> bool:
    """Return whether two tensors have the same bits."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
