"""Random state of one process: taken, put back, saved and loaded, for torch (CPU and GPU), numpy and python.

Reads and writes: nothing; a saved state is tensors, numbers and lists, so that it loads weights-only.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

RandomState = dict[str, Any]


def take_random_state(device: torch.device) -> RandomState:
    """The random state of this process; `device` is the accelerator whose generator belongs to it (or the CPU)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    state: RandomState = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def put_random_state(state: RandomState, device: torch.device) -> None:
    """Puts a taken state back; one taken on a CPU leaves the generator of a GPU as it is."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class RandomStream:
    """A stream of randomness of its own: what runs `inside` continues it and leaves the outer randomness untouched.

    So evaluation, logging or loaders cannot change what is sampled, and saving `state` between two uses is enough to
    resume bit for bit.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = take_random_state(device)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Runs the body on the stream and advances it."""
        outer = take_random_state(self.device)
        put_random_state(self.state, self.device)
        try:
            yield
        finally:
            self.state = take_random_state(self.device)
            put_random_state(outer, self.device)

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Runs the body on a copy of the stream, which stays where it was."""
        before = self.state
        with self.inside():
            yield
        self.state = before
