"""What a stage costs before it starts: named bytes of memory, disk and network, and the work of the arithmetic.

Every room with a stage has a `footprint.py` that fills these types from the values of a recipe, by pure functions;
`lit_puzzle.footprint` collects them for `--plan`. Reads and writes nothing. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What a stage runs on.

    Attributes:
        name: key of `lit_puzzle/costs/gpus.json`.
        kind: `cpu` or `cuda`.
        count: processes of the stage, each with one device.
        memory_bytes: memory of one device (of a CPU: of all processes together).
    """

    name: str
    kind: str
    count: int
    memory_bytes: float

    @property
    def usable_bytes(self) -> float:
        """Bytes that one process may use: a GPU's less 3% and 1.5 GiB for CUDA and its libraries, a CPU's share."""
        return self.memory_bytes * 0.97 - 1.5 * GIB if self.kind == "cuda" else self.memory_bytes / self.count


@dataclass(frozen=True)
class Assumed:
    """What no recipe says, and a plan must assume.

    Attributes:
        prompt_tokens: tokens of a prompt.
        documents: tokens of all documents of a folder that is not there yet.
    """

    prompt_tokens: int = 512
    documents: float = 1e9


@dataclass(frozen=True)
class Phase:
    """What one device holds at the fullest moment of one part of a stage.

    Attributes:
        name: the part of the stage (`rollouts`, `update`).
        parts: what is held -> bytes.
    """

    name: str
    parts: Mapping[str, float]

    @property
    def peak_bytes(self) -> float:
        """Bytes held at once."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Decoding:
    """How tokens are generated after those that are read.

    Attributes:
        tokens: generated for each sequence, one by one.
        rows: sequences that a device decodes together.
        engine: `transformers` or `vllm`, which chooses its rows by itself.
        tensor_parallel: devices that share the weights.
    """

    tokens: int
    rows: int = 1
    engine: str = "transformers"
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Work:
    """Arithmetic of a stage, from which the cost model computes FLOPs and hours.

    Attributes:
        name: what it is for.
        config: the model's `config.json`.
        sequences: how many sequences, over all devices.
        read_tokens: tokens of each that are read by forward passes.
        passes: forward passes over them; a backward pass counts 2, its recomputation 1.
        head_tokens: tokens of each sequence whose logits are computed.
        expert_share: experts evaluated for a token over those that it is routed to (importance: (k + 1) / k).
        dtype: of the arithmetic, `float32` or `bfloat16`.
        decoding: what is generated then; None: nothing.
    """

    name: str
    config: Mapping[str, Any]
    sequences: float
    read_tokens: float
    passes: float = 1.0
    head_tokens: float = 0.0
    expert_share: float = 1.0
    dtype: str = "bfloat16"
    decoding: Decoding | None = None


@dataclass(frozen=True)
class Knob:
    """A setting that changes the peak.

    Attributes:
        key: dotted key of the recipe.
        now: its value.
        values: other values to try, the least painful first.
        what: what the setting is, for messages (`rollouts of {} rows`).
    """

    key: str
    now: Any
    values: Sequence[Any]
    what: str


@dataclass(frozen=True)
class Footprint:
    """What a stage costs.

    Attributes:
        stage: its name.
        phases: memory of one device in each part of the stage.
        host: bytes in a process's own memory beside the device, on a GPU.
        disk: bytes written, over all processes.
        network: bytes that one device receives from others, in the whole run.
        traffic: bytes read from and written to disk in the whole run, over all processes, where they are many: of a
            model that is read one layer at a time.
        works: arithmetic of the whole run.
        knobs: settings that make it smaller.
        notes: what was assumed, and what the numbers leave out.
        refusals: what the stage itself will refuse, in its words.
    """

    stage: str
    phases: tuple[Phase, ...]
    host: Mapping[str, float] = field(default_factory=dict)
    disk: Mapping[str, float] = field(default_factory=dict)
    network: Mapping[str, float] = field(default_factory=dict)
    traffic: Mapping[str, float] = field(default_factory=dict)
    works: tuple[Work, ...] = ()
    knobs: tuple[Knob, ...] = ()
    notes: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()

    @property
    def fullest(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def peak_bytes(self) -> float:
        """Most bytes that one device holds at once."""
        return self.fullest.peak_bytes


def smaller(now: int, least: int = 1) -> list[int]:
    """Return the whole numbers below `now`, largest first: values of a knob."""
    return list(range(now - 1, least - 1, -1)) if now <= 64 else [now * share // 64 for share in range(63, 0, -1)]
