"""Bytes, traffic and arithmetic of blockwise distillation, of one process.

    weights P b / N without the head, embedding whole, a gathered layer when sharded, 16 S / N of what trains
    + 3 states of the parent's layer + the graph of one block

S numbers train in all blocks: a router row for each kept expert, the attention of each block with a window. Pure
functions; imports no torch; reads `config.json` and `library.json`. `lit_puzzle.distill.blocks` is what is counted.
"""

from __future__ import annotations

from lit_puzzle.library.footprint import Candidates, planned_candidates
from lit_puzzle.model.footprint import ModelSize, inside_bytes, model_size, stream_bytes
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.training.footprint import OPTIMIZER_BYTES, load_bytes
from lit_puzzle.training.precision import layer_precision, optimizer_of, width_of


def trained_numbers(size: ModelSize, found: Candidates, together: bool) -> float:
    """Return the numbers that train in all blocks of a library."""
    total = 0.0
    for layer, experts, windows in zip(size.layers, found.experts, found.windows, strict=True):
        rows = sum(count * (size.hidden + 1) for count in experts)
        attention = len(windows) * (layer.attention - 2 * size.hidden)
        total += rows * (1 + len(windows) * together) + attention * (1 + len(experts) * together)
    return total


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


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of blockwise distillation."""
    model, processes = values.inside("model.init_args"), device.count
    planned = planned_config(model.path("parent"))
    size = model_size(planned.config)
    found = planned_candidates(model.path("library"), size)
    numbers = trained_numbers(size, found, model.at("training.sub_blocks") == "together")
    width = width_of(model.at("training.dtype"))
    precision = layer_precision(values.get("trainer.precision"), model.at("training.dtype"))
    rows, row_tokens = (
        values.whole("data.init_args.batch_size", least=1),
        values.whole("data.init_args.sequence_tokens", least=1),
    )
    tokens, updates = rows * row_tokens, max(int(values.get("trainer.max_steps", -1)), 1)
    state = OPTIMIZER_BYTES.get(optimizer_of(values).rpartition(".")[2], 8)
    body = size.parameters - size.table * (1 if size.tied else 2)
    held = {
        "weights": body * width / processes,
        "embedding": float(size.table * width),
        "trained, in float32": 4 * numbers / processes,
        "gradients": 4 * numbers / processes,
        "optimizer": state * numbers / processes,
        "states of the parent": 3 * stream_bytes(size, tokens, precision),
        "inside of one block": inside_bytes(size, tokens, precision),
    }
    if processes > 1:
        held["a gathered layer, with its blocks"] = size.largest_layer * width + 4 * numbers / len(size.layers)
    share, steps = (processes - 1) / processes, updates
    count = steps * rows * processes
    dtype = "float32" if precision == "float32" else "bfloat16"
    halves = found.rows / len(size.layers)
    values_of_tokens = [row_tokens * part // 16 for part in range(15, 0, -1)]
    return Footprint(
        "blockwise distillation",
        (Phase("load", load_bytes(size, width, processes)), Phase("update", held)),
        disk={"library": numbers * width, "2 checkpoints": 2 * numbers * (4.0 + state)},
        network={"updates": steps * (share * body * width + 8 * share * numbers)} if processes > 1 else {},
        works=(
            Work("the parent", planned.config, count, row_tokens, dtype=dtype),
            Work("blocks, forward and backward", planned.config, count, row_tokens, 1.5 * halves, dtype=dtype),
        ),
        knobs=(
            Knob("data.init_args.batch_size", rows, smaller(rows), "batches of {} sequences"),
            Knob("data.init_args.sequence_tokens", row_tokens, values_of_tokens, "sequences of {} tokens"),
        ),
        notes=(planned.assumed, found.assumed, "sequences filled to the last token"),
    )
