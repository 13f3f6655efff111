"""Bytes, traffic and arithmetic of the parent's top-k logits on disk, of one process.

    weights P b / R, whole embedding and head and two gathered layers when sharded, one layer's activations of
    `batch_tokens`, or 12 V C bytes of the logits of a chunk of C targets; one shard of documents on the host
    disk  K (4 + b) + b bytes a target

Pure functions; imports no torch; reads `config.json` and `documents.json`. `lit_puzzle.distill.top_logits` is counted.
"""

from __future__ import annotations

from lit_puzzle.data.footprint import documents_record
from lit_puzzle.model.footprint import BYTES, forward_bytes, model_size, stream_bytes
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.model.streaming_footprint import is_streamed, pass_traffic, state_files
from lit_puzzle.model.streaming_need import layer_bytes, refusals, streamed
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.training.footprint import frozen_states, layer_by_layer, load_bytes

CHUNK_COPIES = 3  # logits in float32, their copies for the k largest and for the rest
MOST_COPIES = 4  # with those that the head gives in another dtype
SHARD_TOKENS = 4e6  # of a shard that is not there


def chunk_bytes(chunk_tokens: int, vocab: int) -> int:
    """Return what the logits of a chunk hold at most: as the head gives them, in float32, and while they are sorted."""
    return MOST_COPIES * 4 * chunk_tokens * vocab


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `precompute_logits`."""
    planned = planned_config(values.path("parent"))
    size, processes = model_size(planned.config), device.count
    precision = {"32-true": "float32"}.get(str(values.at("fabric.precision")), "bfloat16")
    width, tokens, chunk = (
        BYTES[precision],
        values.whole("batch_tokens", least=1),
        values.whole("chunk_tokens", least=1),
    )
    folder = values.path("documents")
    record = documents_record(folder)
    targets = float(record.get("targets", assumed.documents))
    note = "" if record else f"{folder} is not there: {targets:.0e} targets are assumed"
    held = frozen_states(size, width, processes)
    if processes > 1:
        held["embedding and head, whole"] = float(size.ends * width)
    layer = forward_bytes(size, tokens, precision)
    logits = 4.0 * CHUNK_COPIES * size.vocab * chunk + 2 * stream_bytes(size, tokens, precision)
    at_work = {"activations of one layer": layer} if layer > logits else {"logits of a chunk, and states": logits}
    held |= layer_by_layer(size, width, device, at_work, stream_bytes(size, tokens, precision), root=False)
    load, read, budget = load_bytes(size, width, processes), None, values.get("fabric.memory_gib")
    if is_streamed(budget):
        computing = layer_bytes(planned.config, tokens, tokens, width) + chunk_bytes(chunk, size.vocab)
        read = streamed(size, width, device, budget, computing, head=True)
        load, held = read.loaded, dict(read.parts)
    documents = {"a shard of documents": 5.0 * min(targets, SHARD_TOKENS)}
    share, rounds = (processes - 1) / processes, targets / tokens / processes
    shard = min(targets, SHARD_TOKENS)
    top_k, number = values.whole("top_k"), BYTES[str(values.at("precision"))]
    return Footprint(
        "top-k logits",
        (Phase("load", load), Phase("pass", held | (documents if device.kind == "cpu" else {}))),
        host=documents,
        disk={"logits": targets * (top_k * (4 + number) + number)}
        | (state_files(size, width, shard) if read else {}),
        network={"gathered layers": rounds * share * size.parameters * width} if processes > 1 and not read else {},
        traffic=pass_traffic(size, width, targets, processes, targets / max(shard, 1), len(size.layers))
        if read else {},
        works=(Work("pass", planned.config, targets / tokens, tokens, head_tokens=tokens, dtype=precision),),
        knobs=(
            Knob("chunk_tokens", chunk, smaller(chunk), "logits of {} targets at a time"),
            Knob("batch_tokens", tokens, [tokens // 2**power for power in range(1, 6)], "sequences of {} tokens"),
        ),
        notes=(planned.assumed, note),
        refusals=refusals(read),
    )  # fmt: skip
