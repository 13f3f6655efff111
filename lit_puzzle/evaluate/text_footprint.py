"""Bytes and arithmetic of `text_distance`: two models, the states of a batch, the logits of a chunk.

Pure functions; imports no torch; reads `config.json` and `documents.json`.
"""

from __future__ import annotations

from typing import Any

from lit_puzzle.data.footprint import documents_record
from lit_puzzle.model.footprint import BYTES, forward_bytes, model_size
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values

CHUNK_TOKENS = 512  # targets whose logits are computed together
ROW_BYTES = 150  # of a document in the results
COPIES = 5  # log-probabilities of both models; probabilities, differences and products of their divergence


def _lengths(record: dict[str, Any], assumed: Assumed) -> tuple[float, float]:
    """Return the tokens of a document on average, and of the longest."""
    shards = record.get("shards", ())
    if not shards:
        return float(assumed.prompt_tokens), float(assumed.prompt_tokens)
    count = sum(shard["documents"] for shard in shards)
    return float(record["tokens"]) / count, float(max(shard["longest"] for shard in shards))


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `text_distance`."""
    planned = [planned_config(values.path(key)) for key in ("checkpoint", "parent")]
    sizes, dtype = [model_size(plan.config) for plan in planned], str(values.at("dtype"))
    batch, one_in = (values.whole(key) for key in ("batch_size", "validation_one_in"))
    folder = values.path("documents")
    record = documents_record(folder)
    tokens = float(record.get("tokens", assumed.documents))
    note = "" if record else f"{folder} is not there: {tokens:.0e} tokens are assumed"
    length, longest = _lengths(record, assumed)
    weights = {"weights": float(sum(size.parameters for size in sizes) * BYTES[dtype])}
    targets, width = batch * longest, BYTES[dtype]
    layer = forward_bytes(sizes[1], targets, dtype)
    logits = 4.0 * COPIES * sizes[1].vocab * min(CHUNK_TOKENS, targets) + 2 * width * targets * sizes[1].hidden
    held = weights | (
        {"activations of one layer": layer} if layer > logits else {"logits of a chunk, and states": logits}
    )
    sequences = tokens / one_in / length
    return Footprint(
        "text distance",
        (Phase("load", weights), Phase("pass", held)),
        disk={"distances": ROW_BYTES * sequences},
        works=tuple(
            Work(name, plan.config, sequences, length, head_tokens=length, dtype=dtype)
            for name, plan in zip(("checkpoint", "parent"), planned, strict=True)
        ),
        knobs=(Knob("batch_size", batch, smaller(batch), "{} documents at a time"),),
        notes=(planned[0].assumed, note, f"documents of {longest:,.0f} tokens"),
    )
