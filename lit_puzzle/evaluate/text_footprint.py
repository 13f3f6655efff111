"""Bytes and arithmetic of `text_distance`: two models, the states of a batch, the logits of a chunk.

Pure functions; imports no torch; reads `config.json` and `documents.json`.
"""

from __future__ import annotations

import json

from lit_puzzle.model.footprint import BYTES, forward_bytes, model_size
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values

DOCUMENTS_FILE = "documents.json"  # of lit_puzzle.data.document_files
ROW_BYTES = 150  # of a document in the results
COPIES = 4  # logits of both models in float32, and what their divergence is computed from


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `text_distance`."""
    planned = [planned_config(values.path(key)) for key in ("checkpoint", "parent")]
    sizes, dtype = [model_size(plan.config) for plan in planned], str(values.at("dtype"))
    batch, chunk, one_in = (values.whole(key) for key in ("batch_size", "chunk_tokens", "validation_one_in"))
    record, tokens, note = values.path("documents") / DOCUMENTS_FILE, assumed.documents, ""
    if record.is_file():
        tokens = float(json.loads(record.read_text())["tokens"])
    else:
        note = f"{record.parent} is not there: {tokens:.0e} tokens are assumed"
    length = float(assumed.prompt_tokens)
    weights = {"weights": float(sum(size.parameters for size in sizes) * BYTES[dtype])}
    held = weights | {
        "activations of one layer": forward_bytes(sizes[1], batch * length, dtype),
        "logits of a chunk": 4.0 * COPIES * sizes[1].vocab * chunk,
    }
    sequences = tokens / one_in / length
    return Footprint(
        "text distance",
        (Phase("load", weights), Phase("pass", held)),
        disk={"distances": ROW_BYTES * sequences},
        works=tuple(
            Work(name, plan.config, sequences, length, head_tokens=length, dtype=dtype)
            for name, plan in zip(("checkpoint", "parent"), planned, strict=True)
        ),
        knobs=(
            Knob("batch_size", batch, smaller(batch), "{} documents at a time"),
            Knob("chunk_tokens", chunk, smaller(chunk), "logits of {} targets at a time"),
        ),
        notes=(planned[0].assumed, note, f"documents of {length:,.0f} tokens"),
    )
