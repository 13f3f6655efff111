"""Bytes of `assemble`: headers, one trained tensor and a buffer; the disk is the child's. And of `average`: one tensor.

Pure functions; imports no torch; reads `config.json`.
"""

from __future__ import annotations

from lit_puzzle.evaluate.footprint import BYTES_OF_A_TOKEN
from lit_puzzle.generation.footprint import engine_bytes, engine_knobs, engine_name
from lit_puzzle.model.footprint import model_size, stored_bytes
from lit_puzzle.model.planned_shape import planned_child, planned_config
from lit_puzzle.run.footprint import Assumed, Decoding, Device, Footprint, Phase, Work
from lit_puzzle.run.recipe_values import Values

BUFFER = 16 * 2**20  # of copies from file to file
CHUNK = 1 << 24  # values of two tensors that are added at a time (`lit_puzzle.child.averaging`)
BYTES_OF_A_HEADER = 1000  # of a tensor


def copying_bytes(layers: int) -> dict[str, float]:
    """Return what copying a checkpoint from file to file holds."""
    return {"buffer": float(BUFFER), "headers": float(BYTES_OF_A_HEADER * 20 * layers)}


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `assemble`."""
    parent = planned_config(values.path("parent"))
    manual = values.get("manual") or {}
    config, note = planned_child(parent.config, manual) if manual.get("experts") or manual.get("windows") else (
        parent.config, "the child: at most the size of its parent")  # fmt: skip
    size = model_size(config)
    held = copying_bytes(len(size.layers))
    if values.get("library") is not None:
        held["one trained tensor"] = 4.0 * size.hidden * max(size.queries, size.inner)
    return Footprint(
        "assemble",
        (Phase("copy", held),),
        disk={"child": stored_bytes(size)},
        notes=(parent.assumed, note),
    )


def average_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `average`: the averages, and with a sweep the evaluation of each."""
    planned = planned_config(values.path("first"))
    size, width = model_size(planned.config), 2.0
    largest = max(size.vocab * size.hidden, *(layer.experts * 2 * size.inner * size.hidden for layer in size.layers))
    held = copying_bytes(len(size.layers)) | {
        "one tensor, averaged": width * largest,
        "values added at a time": 3 * 4.0 * CHUNK,
    }
    copies = {"child": stored_bytes(size)}
    notes = (planned.assumed, "the largest tensor in 16 bits")
    if values.get("sweep") is None:
        return Footprint("average", (Phase("add", held),), disk=copies, notes=notes)
    sweep = values.inside("sweep")
    engine, new = sweep.inside("engine"), sweep.whole("sampling.max_new_tokens")
    problems = sweep.whole("held_out.prompts_per_effort") * len(sweep.at("held_out.efforts"))
    shares, tokens = len(sweep.at("shares")), assumed.prompt_tokens + new
    episodes = {"episodes": float(BYTES_OF_A_TOKEN * problems * tokens)}
    running = engine_bytes(size, engine, device, assumed.prompt_tokens, new, problems)
    rows, name = engine.whole("batch_size", least=1), engine_name(engine, device)
    decoding = Decoding(new, rows, name, int(engine.get("tensor_parallel", 1)))
    dtype, prompts = str(engine.at("dtype")), shares * problems
    return Footprint(
        "average",
        (Phase("add", held), Phase("completions", running | (episodes if device.kind == "cpu" else {}))),
        host=episodes,
        disk=copies | {"an average that is measured": stored_bytes(size), "episodes": 6.0 * prompts * tokens},
        works=(Work("completions", planned.config, prompts, assumed.prompt_tokens, dtype=dtype, decoding=decoding),),
        knobs=engine_knobs(engine, device),
        notes=(*notes, f"prompts of {assumed.prompt_tokens:,} tokens", "completions as long as allowed"),
    )
