"""Bytes, traffic and arithmetic of blockwise distillation, of one process.

    weights P b / N without the head, embedding whole, a gathered layer when sharded, 16 S / N of what trains
    + 3 states of the parent's layer + the graph of one block

With `memory_gib`: the weights of one layer, and 16 bytes for each number that trains in its blocks; 16 bytes for each
token of different batches; on disk their states, 2 T D b, and as traffic the states of every update besides.

S numbers train in all blocks: a router row for each kept expert, the attention of each block with a window. Pure
functions; imports no torch; reads `config.json` and `library.json`. `lit_puzzle.distill.blocks` is what is counted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lit_puzzle.library.footprint import Candidates, planned_candidates
from lit_puzzle.model.footprint import ModelSize, inside_bytes, model_size, stream_bytes
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.model.streaming_footprint import is_streamed, pass_traffic, state_files
from lit_puzzle.model.streaming_need import Streamed, layer_bytes, refusals, streamed
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.training.footprint import OPTIMIZER_BYTES, load_bytes
from lit_puzzle.training.precision import layer_precision, optimizer_of, width_of

BUFFERS = 1.25  # of the allocator and of arithmetic, over what is counted: `memory_gib` is kept by what is measured
BATCH_BYTES = 16  # of a token: its id and its position


def trained_numbers(size: ModelSize, found: Candidates, together: bool) -> list[float]:
    """Return the numbers that train in the blocks of a library, of each layer."""
    numbers: list[float] = []
    for layer, experts, windows in zip(size.layers, found.experts, found.windows, strict=True):
        rows = sum(count * (size.hidden + 1) for count in experts)
        attention = len(windows) * (layer.attention - 2 * size.hidden)
        numbers.append(rows * (1 + len(windows) * together) + attention * (1 + len(experts) * together))
    return numbers


def layer_training_bytes(size: ModelSize, tokens: float, precision: str, numbers: float) -> dict[str, float]:
    """Return what training the blocks of one layer holds beside the parent's weights, on one process.

    Args:
        size: the parent.
        tokens: of a batch.
        precision: of the arithmetic, a key of `lit_puzzle.model.activation_bytes.ACTIVATIONS`.
        numbers: that train in the blocks of the layer.
    """
    return {
        "trained, in float32": 4.0 * numbers,
        "gradients": 4.0 * numbers,
        "optimizer": 8.0 * numbers,
        "states of the parent": 3 * stream_bytes(size, tokens, precision),
        "inside of one block": inside_bytes(size, tokens, precision),
    }


@dataclass(frozen=True)
class BlockRun:
    """What the footprint of a run of blockwise distillation is counted from.

    Attributes:
        size: the parent.
        width: bytes of a number of its weights.
        precision: of the arithmetic.
        by_layer: numbers that train in the blocks of each layer.
        rows: sequences of a batch.
        row_tokens: tokens of a sequence.
        updates: of every block.
        state: bytes of the optimizer for each number.
        device: what each process has, and how many there are.
    """

    size: ModelSize
    width: int
    precision: str
    by_layer: list[float]
    rows: int
    row_tokens: int
    updates: int
    state: int
    device: Device

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.device.count

    @property
    def numbers(self) -> float:
        """Numbers that train, in all blocks."""
        return sum(self.by_layer)

    def update(self) -> dict[str, float]:
        """Return what a process holds in an update of all blocks."""
        share, size, tokens = self.numbers / self.processes, self.size, self.rows * self.row_tokens
        body = size.parameters - size.table * (1 if size.tied else 2)
        held = {
            "weights": body * self.width / self.processes,
            "embedding": float(size.table * self.width),
            "trained, in float32": 4 * share,
            "gradients": 4 * share,
            "optimizer": self.state * share,
            "states of the parent": 3 * stream_bytes(size, tokens, self.precision),
            "inside of one block": inside_bytes(size, tokens, self.precision),
        }
        if self.processes > 1:
            held["a gathered layer, with its blocks"] = size.largest_layer * self.width + 4 * max(self.by_layer)
        return held

    def read_from_disk(self, memory_gib: float) -> Streamed:
        """Return what the process holds when the blocks of one layer train that was read from disk."""
        tokens = self.rows * self.row_tokens
        training = BUFFERS * sum(layer_training_bytes(self.size, tokens, self.precision, max(self.by_layer)).values())
        computing = max(training, layer_bytes(self.size.config, tokens, self.row_tokens, self.width))
        kept = BATCH_BYTES * self.tokens if self.device.kind == "cpu" else 0.0
        return streamed(self.size, self.width, self.device, memory_gib, computing, kept)

    @property
    def tokens(self) -> float:
        """Tokens of all updates of all processes."""
        return float(self.updates * self.processes * self.rows * self.row_tokens)


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of blockwise distillation."""
    model = values.inside("model.init_args")
    planned = planned_config(model.path("parent"))
    size = model_size(planned.config)
    found = planned_candidates(model.path("library"), size)
    run = BlockRun(
        size,
        width_of(model.at("training.dtype")),
        layer_precision(values.get("trainer.precision"), model.at("training.dtype")),
        trained_numbers(size, found, model.at("training.sub_blocks") == "together"),
        values.whole("data.init_args.batch_size", least=1),
        values.whole("data.init_args.sequence_tokens", least=1),
        max(int(values.get("trainer.max_steps", -1)), 1),
        OPTIMIZER_BYTES.get(optimizer_of(values).rpartition(".")[2], 8),
        device,
    )
    budget = model.get("memory_gib")
    made = _streamed(run, budget) if is_streamed(budget) else _resident(run)
    count, dtype = run.updates * run.rows * run.processes, "float32" if run.precision == "float32" else "bfloat16"
    halves = found.rows / len(size.layers)
    values_of_tokens = [run.row_tokens * part // 16 for part in range(15, 0, -1)]
    return dataclasses.replace(
        made,
        works=(
            Work("the parent", planned.config, count, run.row_tokens, dtype=dtype),
            Work("blocks, forward and backward", planned.config, count, run.row_tokens, 1.5 * halves, dtype=dtype),
        ),
        knobs=(
            Knob("data.init_args.batch_size", run.rows, smaller(run.rows), "batches of {} sequences"),
            Knob("data.init_args.sequence_tokens", run.row_tokens, values_of_tokens, "sequences of {} tokens"),
        ),
        notes=(planned.assumed, found.assumed, "sequences filled to the last token", *made.notes),
    )


def _resident(run: BlockRun) -> Footprint:
    share = (run.processes - 1) / run.processes
    body = run.size.parameters - run.size.table * (1 if run.size.tied else 2)
    received = run.updates * (share * body * run.width + 8 * share * run.numbers)
    return Footprint(
        "blockwise distillation",
        (Phase("load", load_bytes(run.size, run.width, run.processes)), Phase("update", run.update())),
        disk={"library": run.numbers * run.width, "2 checkpoints": 2 * run.numbers * (4.0 + run.state)},
        network={"updates": received} if run.processes > 1 else {},
    )


def _streamed(run: BlockRun, memory_gib: float) -> Footprint:
    """Return memory, disk and traffic under a budget; batches that come again have their states once, at most all."""
    layers, states_of_token = len(run.size.layers), run.size.hidden * run.width
    read = run.read_from_disk(memory_gib)
    several = f"memory_gib={memory_gib:g} takes one process, not {run.processes}: set trainer.devices: 1."
    return Footprint(
        "blockwise distillation",
        (Phase("load", read.loaded), Phase("update", read.parts)),
        host={"different batches": BATCH_BYTES * run.tokens},
        disk={
            "library": run.numbers * run.width,
            "trained layers": 4.0 * run.numbers,
            "2 checkpoints": 2 * max(run.by_layer) * (4.0 + run.state),
        }
        | state_files(run.size, run.width, run.tokens),
        traffic=pass_traffic(run.size, run.width, run.tokens, 1)
        | {"hidden states, read in updates": 2.0 * layers * run.tokens * states_of_token},
        refusals=(several,) if run.processes > 1 else refusals(read),
    )
