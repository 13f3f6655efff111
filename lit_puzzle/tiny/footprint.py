"""Bytes and arithmetic of the tiny parent's pretraining: 16 P, all of its activations, the scores of eager attention.

Pure functions; imports no torch; reads nothing.
"""

from __future__ import annotations

from lit_puzzle.model.footprint import model_size, saved_bytes
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values

SCORE_COPIES = 4


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `tiny_parent`."""
    shape = dict(values.at("model.init_args.shape"))
    config = {"model_type": "gpt_oss", **shape, **shape.pop("attention")}
    size, data = model_size(config), values.inside("data.init_args.curriculum")
    rows, row_tokens = data.whole("sequences"), data.whole("sequence_tokens", least=1)
    tokens, steps = rows * row_tokens, int(values.at("trainer.max_steps"))
    scores = 4.0 * SCORE_COPIES * size.heads * tokens * row_tokens * len(size.layers)
    held = {
        "weights": 4.0 * size.parameters,
        "gradients": 4.0 * size.parameters,
        "optimizer": 8.0 * size.parameters,
        "activations": saved_bytes(size, tokens, "float32") + scores + 12.0 * tokens * size.vocab,
    }
    key = "data.init_args.curriculum.sequences"
    return Footprint(
        "tiny parent",
        (Phase("update", held),),
        disk={"model and a checkpoint": 16.0 * size.parameters},
        works=(Work("updates", config, steps * rows, row_tokens, 3, row_tokens, dtype="float32"),),
        knobs=(Knob(key, rows, smaller(rows), "batches of {} sequences"),),
    )
