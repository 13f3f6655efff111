"""Bytes and arithmetic of the tiny parent's pretraining: 16 P, all of its activations, the scores of eager attention.

At the end a copy in float32 (4 P, then the saved weights, rounded) is evaluated, beside all that has trained. Pure
functions; imports no torch; reads nothing.
"""

from __future__ import annotations

from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.generation.footprint import decoding_bytes
from lit_puzzle.model.footprint import model_size, saved_bytes
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Knob, Phase, Work, smaller
from lit_puzzle.run.recipe_values import Values

SCORE_COPIES = 2  # for each layer, from forward to backward
EVALUATED_ROWS = 128  # of lit_puzzle.tiny.pretrain, that are generated together


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `tiny_parent`."""
    shape = dict(values.at("model.init_args.shape"))
    config = {"model_type": "gpt_oss", **shape, **shape.pop("attention")}
    size, data = model_size(config), values.inside("data.init_args.curriculum")
    rows, row_tokens = data.whole("sequences"), data.whole("sequence_tokens", least=1)
    tokens, steps = rows * row_tokens, int(values.at("trainer.max_steps"))
    scores = 4.0 * SCORE_COPIES * size.heads * tokens * row_tokens * len(size.layers)
    states = {
        "weights": 4.0 * size.parameters,
        "gradients": 4.0 * size.parameters,
        "optimizer": 8.0 * size.parameters,
    }
    update = {"activations": saved_bytes(size, tokens, "float32") + scores + 12.0 * tokens * size.vocab}
    problems = values.whole("model.init_args.measured_per_effort") * len(EFFORTS)
    new = values.whole("model.init_args.sampling.max_new_tokens")
    copy = {"copy that is saved and evaluated": 4.0 * size.parameters}
    copy |= decoding_bytes(size, min(EVALUATED_ROWS, problems), assumed.prompt_tokens, new, 4)
    key = "data.init_args.curriculum.sequences"
    return Footprint(
        "tiny parent",
        (Phase("update", states | update), Phase("evaluation at the end", states | copy)),
        disk={"model and a checkpoint": 16.0 * size.parameters},
        works=(Work("updates", config, steps * rows, row_tokens, 3, row_tokens, dtype="float32"),),
        knobs=(Knob(key, rows, smaller(rows), "batches of {} sequences"),),
    )
