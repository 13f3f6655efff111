"""Bytes of the tensors that PyTorch holds at the fullest moments of a decoder layer, per token and channel: data.

Counted by `scripts/bench/layer_bytes.py`, storage by storage, with layers that are wide in one size after another; a
moment is the row that is largest for some shape. The rows of `bfloat16` are taken from `bf16-mixed`. On a GPU the
kernels of attention differ, their tensors do not. Imports no torch; reads and writes nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class Held(NamedTuple):
    """Bytes of a layer's tensors at one moment, per token and channel of each kind; the legend is above."""

    hidden: float
    inner: float
    outputs: float
    queries: float
    keys: float
    experts: float = 0.0
    constant: float = 0.0


class Activations(NamedTuple):
    """What a layer holds, by precision.

    Attributes:
        saved: between its forward and its backward pass.
        forward: at the fullest moments without gradients, the layer's input included.
        recorded: at the fullest moments of a forward pass that records gradients, `saved` included.
        backward: at the fullest moments of a backward pass, `saved` included.
        stream: bytes of a number of the residual stream, in which layers hand on their states.
    """

    saved: Held
    forward: tuple[Held, ...]
    recorded: tuple[Held, ...]
    backward: tuple[Held, ...]
    stream: int


# D, k I, k D, Q, K, E, constant
ACTIVATIONS = {
    "float32": Activations(
        saved=Held(32, 24, 4, 12.2, 8.2, 0, 200),
        forward=(Held(12, 36, 4, 0, 0, 4, 150), Held(12, 0, 20, 0, 0, 4, 150), Held(8, 0, 0, 12.2, 16.3, 0, 150)),
        recorded=(
            Held(24, 40, 4, 12.2, 8.2, 4, 250),
            Held(24, 24, 20, 12.2, 8.2, 4, 250),
            Held(16, 0, 0, 16.2, 16.3, 0, 250),
        ),
        backward=(
            Held(16, 36, 4, 12.2, 8.2, 0, 250),
            Held(32, 24, 16, 12.2, 8.2, 0, 250),
            Held(24, 0, 0, 16.5, 16.5, 0, 250),
        ),
        stream=4,
    ),
    "bf16-mixed": Activations(
        saved=Held(22, 12, 2, 6.1, 4, 0, 50),
        forward=(Held(6, 18, 2, 0, 0, 2, 150), Held(6, 0, 10, 0, 0, 2, 150), Held(5, 0, 0, 6, 8)),
        recorded=(Held(24, 20, 2, 6.1, 4, 2, 170), Held(24, 12, 10, 6.1, 4, 2, 170)),
        backward=(Held(16, 18, 2, 6.1, 4, 0, 120), Held(24, 12, 8, 6.1, 4, 0, 150), Held(19, 0, 0, 16.1, 8)),
        stream=2,
    ),
    "bfloat16": Activations(
        saved=Held(22, 12, 2, 6.1, 4, 0, 50),
        forward=(Held(6, 18, 2, 0, 0, 2, 150), Held(6, 0, 10, 0, 0, 2, 150), Held(5, 0, 0, 6, 8)),
        recorded=(Held(24, 20, 2, 6.1, 4, 2, 170), Held(24, 12, 10, 6.1, 4, 2, 170)),
        backward=(Held(16, 18, 2, 6.1, 4, 0, 120), Held(24, 12, 8, 6.1, 4, 0, 150), Held(19, 0, 0, 16.1, 8)),
        stream=2,
    ),
}
