"""Bytes of `assemble`: headers and a buffer; the disk is the child's. And of `average`: one tensor.

    assemble    1.25 MiB of small files + 28 KB for a layer: its headers, names, places and configuration
                + a buffer, of the largest tensor or 16 MiB, whose values are checked and copied
    average     b (n - m) + 12 m + headers, for the largest tensor of n numbers of b bytes, m = min(n, 2^24)

Pure functions; imports no torch; reads `config.json`.
"""

from __future__ import annotations

from lit_puzzle.evaluate.footprint import BYTES_OF_A_TOKEN
from lit_puzzle.generation.footprint import engine_bytes, engine_knobs, engine_name
from lit_puzzle.model.footprint import ModelSize, model_size, stored_bytes, stored_width
from lit_puzzle.model.planned_shape import planned_child, planned_config
from lit_puzzle.run.footprint import Assumed, Decoding, Device, Footprint, Phase, Work
from lit_puzzle.run.recipe_values import Values

BUFFER = 16 * 2**20  # of copies from file to file
CHUNK = 1 << 24  # values of two tensors that are added at a time (`lit_puzzle.child.averaging`)
SMALL_FILES = 5 * 2**18  # tokenizer, template, and what is open
BYTES_OF_A_LAYER = 28_000  # of some 17 tensors: header, name, place; and of the layer's configuration


def copying_bytes(size: ModelSize) -> dict[str, float]:
    """Return what copying a checkpoint from file to file holds."""
    buffer = min(float(BUFFER), largest_tensor(size) * stored_width(size))
    return {"buffer": buffer, "headers and places": float(SMALL_FILES + BYTES_OF_A_LAYER * len(size.layers))}


def largest_tensor(size: ModelSize) -> int:
    """Return the numbers of the largest tensor: embedding, or gate and up of all experts of a layer."""
    return max(size.table, *(layer.experts * 2 * size.inner * size.hidden for layer in size.layers))


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `assemble`."""
    parent = planned_config(values.path("parent"))
    manual = values.get("manual") or {}
    config, note = planned_child(parent.config, manual) if manual.get("experts") or manual.get("windows") else (
        parent.config, "the child: at most the size of its parent")  # fmt: skip
    size = model_size(config)
    return Footprint(
        "assemble",
        (Phase("copy", copying_bytes(size)),),
        disk={"child": stored_bytes(size)},
        notes=(parent.assumed, note),
    )


def average_footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `average`: the averages, and with a sweep the evaluation of each."""
    planned = planned_config(values.path("first"))
    size = model_size(planned.config)
    largest, width = largest_tensor(size), stored_width(size)
    chunk = min(largest, CHUNK)
    held = {
        "one tensor, averaged": float(width * (largest - chunk)),
        "values added at a time": 3 * 4.0 * chunk,
        "headers and places": float(SMALL_FILES + BYTES_OF_A_LAYER * len(size.layers)),
    }
    copies = {"child": stored_bytes(size)}
    notes = (planned.assumed,)
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
