"""Random state of one process: get, set, and streams of their own, for torch (CPU and GPU), numpy and Python.

Reads and writes nothing. A state consists of tensors, numbers and lists, so that it can be loaded weights-only.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import distributed

RandomState = dict[str, Any]


def get_random_state(device: torch.device) -> RandomState:
    """Return the random state of this process; `device` is its accelerator, or the CPU."""
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


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Set the random state of this process; one from a CPU leaves the generator of a GPU as it is."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class RandomStream:
    """A random state of its own: a body that runs `inside` advances it and leaves the global state untouched.

    So evaluation, logging or loaders cannot change what is sampled, and saving `state` between two uses is enough to
    resume bit for bit.

    Args:
        device: accelerator of this process, or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = get_random_state(device)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run the body on the stream and advance it."""
        outer = get_random_state(self.device)
        set_random_state(self.state, self.device)
        try:
            yield
        finally:
            self.state = get_random_state(self.device)
            set_random_state(outer, self.device)

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Run the body on a copy of the stream, which does not advance."""
        before = self.state
        with self.inside():
            yield
        self.state = before


def of_all_processes(own: RandomState) -> list[RandomState]:
    """Return the random states of all processes, on each."""
    if not distributed.is_initialized():
        return [own]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, own)
    return states
