"""Bytes, traffic and arithmetic of expert importance, of one process.

    weights P b / N, two gathered layers with embedding and head when sharded (three while gloo gathers one and none is
    at work); attention of a batch; or, of a chunk of
    n tokens of the MoE layer:  4 n D (2 k + 1) + 8 n (4 E + 4 k (k + 1)) + 4 m (2 D + 6 I),  m tokens of the busiest
    expert (twice its fair share is assumed), beside the layer's input, normed input and output.

Pure functions; imports no torch; reads `config.json`. `lit_puzzle.importance.expert_scores` is what is counted.
"""

from __future__ import annotations

from lit_puzzle.data.footprint import sequences_of
from lit_puzzle.model.footprint import BYTES, ModelSize, attention_bytes, model_size, stream_bytes
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.model.streaming_footprint import is_streamed, pass_traffic, state_files
from lit_puzzle.model.streaming_need import layer_bytes, refusals, streamed
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.training.footprint import frozen_states, layer_by_layer, load_bytes

BUSIEST = 2.0  # tokens of the busiest expert over its fair share


def chunk_bytes(size: ModelSize, tokens: float, entrant: bool = True) -> float:
    """Return what scoring a chunk of tokens holds in one layer, whose errors are computed in float32."""
    evaluated = size.top_k + entrant
    experts = max(layer.experts for layer in size.layers)
    busiest = min(tokens, BUSIEST * tokens * evaluated / experts)
    return (
        4 * tokens * size.hidden * (2 * size.top_k + 1)
        + 8 * tokens * (4 * experts + 4 * size.top_k * evaluated)
        + 4 * busiest * (2 * size.hidden + 6 * size.inner)
    )


def most_chunk_bytes(size: ModelSize, tokens: int, width: int) -> int:
    """Return what scoring a chunk holds at most, with all of its tokens routed to one expert: for a budget."""
    exact, experts = max(width, 4), max(layer.experts for layer in size.layers)
    outputs = exact * tokens * size.hidden * (2 * size.top_k + 1)
    routing = 8 * tokens * (4 * experts + 4 * size.top_k * (size.top_k + 1))
    return outputs + routing + (exact + width) * tokens * (2 * size.hidden + 6 * size.inner)


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of expert importance."""
    planned, model = planned_config(values.path("model.init_args.parent")), values.inside("model.init_args")
    size, dtype = model_size(planned.config), str(model.at("dtype"))
    width, data = BYTES[dtype], sequences_of(values.inside("data"), device, assumed)
    chunk = min(model.whole("chunk_tokens", least=1), data.batch_tokens)
    held = {
        "states around a layer": 3 * stream_bytes(size, data.batch_tokens, dtype),
        "experts of a chunk": chunk_bytes(size, chunk),
    }
    attention = attention_bytes(size, data.batch_tokens, dtype)
    if attention > sum(held.values()):
        held = {"attention of a batch": attention}
    budget, count = model.get("memory_gib"), device.count
    entering = stream_bytes(size, data.batch_tokens, dtype)
    held = frozen_states(size, width, count) | layer_by_layer(size, width, device, held, entering)
    load = load_bytes(size, width, count)
    read = None
    if is_streamed(budget):
        computing = layer_bytes(planned.config, data.batch_tokens, data.tokens, width)
        read = streamed(size, width, device, budget, computing + most_chunk_bytes(size, int(chunk), width))
        load, held = read.loaded, dict(read.parts)
    share = (size.top_k + 1) / size.top_k
    batches, tokens = data.count / data.batch_size, data.count * data.tokens
    network = batches / device.count * (device.count - 1) / device.count * size.parameters * width
    return Footprint(
        "expert importance",
        (
            Phase("load", load),
            *((Phase("completions of the parent", data.generating),) if data.generating else ()),
            Phase("pass", held),
        ),
        host={"calibration sequences": 24.0 * data.count},
        disk={"scores": 8.0 * sum(layer.experts for layer in size.layers)}
        | (state_files(size, width, tokens) if read else {}),
        network={"gathered layers": network} if device.count > 1 and not read else {},
        traffic=pass_traffic(size, width, tokens, device.count) if read else {},
        works=(Work("pass", planned.config, data.count, data.tokens, expert_share=share, dtype=_arithmetic(dtype)),),
        knobs=(
            Knob("data.init_args.batch_size", data.batch_size, smaller(data.batch_size), "batches of {} sequences"),
            Knob(model.key("chunk_tokens"), int(chunk), smaller(int(chunk), 64), "chunks of {} tokens"),
        ),
        notes=(planned.assumed, data.assumed),
        refusals=refusals(read),
    )


def combine_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `combine_importance`: a few numbers per expert, no weights."""
    planned = planned_config(values.path("parent"))
    experts = sum(layer.experts for layer in model_size(planned.config).layers)
    held = 8.0 * experts * (len(values.at("importances")) + 1)
    return Footprint(
        "combined importance",
        (Phase("scores", {"scores": held}),),
        disk={"scores": 8.0 * experts},
        notes=(planned.assumed,),
    )


def _arithmetic(dtype: str) -> str:
    return "float32" if dtype == "float32" else "bfloat16"
