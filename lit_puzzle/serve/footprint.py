"""Bytes of `export`, `serve_check` and `throughput`.

    export        headers and a buffer; packing E N 17/32 + 22 N (18 N of float32), unpacking 2 E N + max(2 E N, 20 N)
                  bytes for the larger matrix of a layer of E experts with N numbers each; one tensor where its dtype
                  changes
    serve_check   transformers with 4 bytes a parameter (2 in bfloat16), then vLLM the same + vllm.kv_cache_gib
    throughput    vLLM, for each engine at a time: weights + kv_cache_gib, or the GPU; predicted or stated: nothing
    both          what vLLM works on: the activations of a layer for the prompts it reads at a time, IN_FLIGHT at most

Pure functions; imports no torch; reads `config.json`.
"""

from __future__ import annotations

from lit_puzzle.child.footprint import copying_bytes, largest_tensor
from lit_puzzle.generation.footprint import vllm_bytes, vllm_weights
from lit_puzzle.model.footprint import BYTES, ModelSize, forward_bytes, model_size, stored_bytes, stored_width
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import GIB, Assumed, Decoding, Device, Footprint, Phase, Work
from lit_puzzle.run.recipe_values import Values

PACKED = 4.25 / 8  # bytes of a number in MXFP4
IN_FLIGHT = 8192  # tokens of the prompts that vLLM reads together, at most (its `max_num_batched_tokens`)


def export_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `export`."""
    planned = planned_config(values.path("checkpoint"))
    size = model_size(planned.config)
    held, experts = copying_bytes(size), str(values.at("storage.experts"))
    dtype, most = str(values.at("storage.dtype")), max(layer.experts for layer in size.layers)
    one = 2 * size.inner * size.hidden  # numbers of the larger matrix of an expert
    disk, at_work = stored_bytes(size), {}
    if dtype != "stored" and BYTES[dtype] != stored_width(size):
        at_work["a tensor in another dtype"] = float(BYTES[dtype] * largest_tensor(size))
    is_packed = "quantization_config" in size.config
    if experts == "mxfp4" and not is_packed:
        at_a_time = 18.0 if stored_width(size) == 4 else 22.0  # in float32 already
        at_work["experts of a layer, packed, and one at work"] = PACKED * most * one + at_a_time * one
    elif experts == "plain" and is_packed:
        at_work["experts of a layer, in rows and transposed"] = 2.0 * most * one + max(2.0 * most * one, 20.0 * one)
    if sum(at_work.values()) > held["buffer"]:  # one after the other
        held = {"headers and places": held["headers and places"]} | at_work
    if experts != "stored":
        disk = (size.parameters - size.expert_parameters) * 2
        disk += size.expert_parameters * (2.0 if experts == "plain" else PACKED)
    return Footprint("export", (Phase("copy", held),), disk={"model": disk}, notes=(planned.assumed,))


def check_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `serve_check`."""
    planned = planned_config(values.path("checkpoint"))
    size, width = model_size(planned.config), BYTES[str(values.at("vllm.dtype"))]
    tokens = values.whole("prompts.tokens") + values.whole("prompts.new_tokens")
    precision = "float32" if width == 4 else "bfloat16"
    weights = {"weights": float(size.parameters * width)}
    reading = forward_bytes(size, values.whole("prompts.count") * tokens, precision)
    cache = {"KV cache": values.number("vllm.kv_cache_gib") * GIB}
    cache |= _working(size, values.whole("prompts.count") * tokens, precision)
    return Footprint(
        "serve_check",
        (
            Phase("transformers", weights | {"activations of one layer": reading}),
            Phase("vLLM", {"weights, the checked and a reloaded layer": weights["weights"] + size.largest_layer * width}
                  | cache),
        ),
        disk={"report": 1e6},
        notes=(planned.assumed,),
    )  # fmt: skip


def throughput_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `throughput`."""
    source = values.inside("source")
    if not str(source.get("class_path")).endswith(".Measured"):
        return Footprint("throughput", (Phase("cost model", {"tables of kernel times": 64.0 * 2**20}),))
    planned = {name: planned_config(values.path(name)) for name in ("parent", "child")}
    engines, work = source.inside("init_args.engines"), source.inside("init_args.workload")
    dtype, together, cache = str(engines.at("dtype")), bool(engines.at("together")), engines.get("kv_cache_gib")
    batches, held = [int(batch) for batch in work.at("batches")], dict[str, float]()
    ranks = int(engines.get("tensor_parallel", 1))
    devices, on_each = (1, ranks) if device.kind == "cpu" else (ranks, 1)
    for name, plan in planned.items():
        size = model_size(plan.config)
        if cache is None:
            parts = vllm_bytes(size, device, devices, BYTES[dtype])
        else:
            weights = vllm_weights(size, device, devices, BYTES[dtype])
            parts = {"weights": weights, "KV cache": on_each * engines.number("kv_cache_gib") * GIB}
            precision = "float32" if dtype == "float32" else "bfloat16"
            parts |= _working(size, max(batches) * work.whole("prompt_tokens"), precision)
        held = {f"{part} of the {name}": number for part, number in parts.items()} | (held if together else {})
    prompt, generated = work.whole("prompt_tokens"), work.whole("generated_tokens")
    works = tuple(
        Work(
            f"{name}, {batch} requests",
            plan.config,
            float(batch * (work.whole("rounds") + 1)),
            float(prompt),
            dtype=dtype,
            decoding=Decoding(generated, batch, "vllm", ranks),
        )
        for name, plan in planned.items()
        for batch in batches
    )
    notes = tuple(plan.assumed for plan in planned.values())
    return Footprint("throughput", (Phase("vLLM", held),), disk={"logs": 1e6}, works=works, notes=notes)


def _working(size: ModelSize, tokens: float, precision: str) -> dict[str, float]:
    """Return what vLLM holds beside weights and KV cache while it reads prompts of so many tokens."""
    return {"activations of one layer in vLLM": forward_bytes(size, min(tokens, IN_FLIGHT), precision)}
