"""Bytes, traffic and arithmetic of the calibration of an FP8 KV cache, of one process.

    weights P b / N, two gathered layers when sharded, one layer's activations of a batch
    statistics  8 L (2 G + 2 x 65536 h) bytes for G key/value heads, h = G with a scale for each head, else 1
    20 bytes for each key or value of one layer in the batch

Pure functions; imports no torch; reads `config.json`. `lit_puzzle.kv_cache.statistics` is what is counted.
"""

from __future__ import annotations

from lit_puzzle.data.footprint import sequences_of
from lit_puzzle.model.footprint import BYTES, ModelSize, forward_bytes, model_size, stream_bytes
from lit_puzzle.model.layout import whole
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.model.streaming_footprint import is_streamed, pass_traffic, state_files
from lit_puzzle.model.streaming_need import layer_bytes, refusals, streamed
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values
from lit_puzzle.training.footprint import frozen_states, layer_by_layer, load_bytes

MAGNITUDES = 65536  # of lit_puzzle.kv_cache.fp8: magnitudes of a bfloat16 number, and overflow
BYTES_OF_A_VALUE = 20


def value_bytes(size: ModelSize, tokens: float) -> int:
    """Return what counting the keys or values of one layer in a batch holds."""
    return int(BYTES_OF_A_VALUE * size.keys * tokens)


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `calibrate_kv`."""
    model = values.inside("model.init_args")
    planned = planned_config(model.path("checkpoint"))
    size, dtype = model_size(planned.config), str(model.at("dtype"))
    data, width = sequences_of(values.inside("data"), device, assumed), BYTES[dtype]
    heads = whole(planned.config, "num_key_value_heads")
    sets = heads if model.at("scales.per_head") else 1
    one_in = int(values.get("data.init_args.validation_one_in", 1))
    count = data.count / one_in
    statistics = 8.0 * len(size.layers) * (heads + MAGNITUDES * 2 * sets)
    values_bytes, budget = value_bytes(size, data.batch_tokens), model.get("memory_gib")
    layer = {"activations of one layer": max(forward_bytes(size, data.batch_tokens, dtype), values_bytes)}
    held = {"statistics": statistics} | frozen_states(size, width, device.count)
    held |= layer_by_layer(size, width, device, layer, stream_bytes(size, data.batch_tokens, dtype))
    load, read = load_bytes(size, width, device.count), None
    if is_streamed(budget):
        computing = values_bytes + layer_bytes(planned.config, data.batch_tokens, data.tokens, width)
        read = streamed(size, width, device, budget, computing, kept=statistics)
        load, held = read.loaded, dict(read.parts)
    share = (device.count - 1) / device.count * size.parameters * width
    rows, tokens = data.batch_size, count * data.tokens
    gathered = device.count > 1 and not read
    return Footprint(
        "KV calibration",
        (
            Phase("load", load),
            *((Phase("completions", data.generating),) if data.generating else ()),
            Phase("pass", held),
        ),
        host={"calibration sequences": 24.0 * count},
        disk={"scales and progress": statistics * device.count} | (state_files(size, width, tokens) if read else {}),
        network={"gathered layers": count / rows / device.count * share} if gathered else {},
        traffic=pass_traffic(size, width, tokens, device.count) if read else {},
        works=(Work("pass", planned.config, count, data.tokens, dtype=dtype),),
        knobs=(Knob("data.init_args.batch_size", rows, smaller(rows), "batches of {} sequences"),),
        notes=(planned.assumed, data.assumed),
        refusals=refusals(read),
    )
