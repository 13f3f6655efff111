"""Bytes of `export`, `serve_check` and `throughput`.

    export        headers and a buffer; with plain or mxfp4 experts, one expert matrix of a layer in both forms
    serve_check   transformers with 4 bytes a parameter (2 in bfloat16), then vLLM the same + vllm.kv_cache_gib
    throughput    vLLM, for each engine at a time: weights + kv_cache_gib, or the GPU; predicted or stated: nothing

Pure functions; imports no torch; reads `config.json`.
"""

from __future__ import annotations

from lit_puzzle.child.footprint import copying_bytes
from lit_puzzle.generation.footprint import vllm_bytes
from lit_puzzle.model.footprint import BYTES, forward_bytes, model_size, stored_bytes
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import GIB, Assumed, Decoding, Device, Footprint, Phase, Work
from lit_puzzle.run.recipe_values import Values


def export_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `export`."""
    planned = planned_config(values.path("checkpoint"))
    size = model_size(planned.config)
    held, experts = copying_bytes(len(size.layers)), str(values.at("storage.experts"))
    largest = max(layer.experts for layer in size.layers) * 2 * size.inner * size.hidden
    disk = stored_bytes(size)
    if experts != "stored":
        held["one expert matrix of a layer, in both forms"] = largest * (4 + 2 + 4.25 / 8)
        width = 2.0 if experts == "plain" else 4.25 / 8
        disk = (size.parameters - size.expert_parameters) * 2 + size.expert_parameters * width
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
    held: dict[str, float] = {}
    for name, plan in planned.items():
        size = model_size(plan.config)
        if cache is None:
            parts = vllm_bytes(size, device, 1)
        else:
            parts = {"weights": float(size.parameters * BYTES[dtype]), "KV cache": engines.number("kv_cache_gib") * GIB}
        held = {f"{part} of the {name}": number for part, number in parts.items()} | (held if together else {})
    prompt, generated = work.whole("prompt_tokens"), work.whole("generated_tokens")
    batches = [int(batch) for batch in work.at("batches")]
    works = tuple(
        Work(
            f"{name}, {batch} requests",
            plan.config,
            float(batch * (work.whole("rounds") + 1)),
            float(prompt),
            dtype=dtype,
            decoding=Decoding(generated, batch, "vllm", 1),
        )
        for name, plan in planned.items()
        for batch in batches
    )
    notes = tuple(plan.assumed for plan in planned.values())
    return Footprint("throughput", (Phase("vLLM", held),), disk={"logs": 1e6}, works=works, notes=notes)
