"""Programs over a library of four gpt-oss layers with 128, 64, 30 or 2 experts each, costed by the roofline."""

from typing import Any

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.library.library import Candidate, Library, candidate_name, parent_blocks
from lit_puzzle.search.program import SearchProgram, build_program
from lit_puzzle.search.settings import Constraints, SearchSpace
from lit_puzzle.spec import BlockSpec, Budget, Scenario, Target

CONFIG = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
}
SCENARIO = Scenario("H100", 2, 4096, 1024)
NOTHING = Budget()


def library() -> Library:
    """Return the whole library: a full-attention layer may have a window of 1024 tokens instead."""
    layers = []
    for own in parent_blocks(CONFIG):
        windows = (None, 1024) if own.window_tokens is None else (128,)
        blocks = [BlockSpec(tuple(range(count)), window) for window in windows for count in (128, 64, 30, 2)]
        layers.append(tuple(Candidate(candidate_name(own, block), block) for block in blocks))
    return Library("parent", 128, CONFIG, tuple(layers))


LAYERS = tuple(tuple(c for c in row if c.block.num_experts > 2) for row in library().layers)  # at least top-k experts


def program(
    *targets: Target, layers: tuple[tuple[Candidate, ...], ...] = LAYERS, limits: Budget = NOTHING, **space: Any
) -> SearchProgram:
    """Return the program of these targets; a candidate's quality loss is its position in its layer.

    Args:
        targets: scenarios with their budgets.
        layers: the candidates of each layer.
        limits: the budget of the plan itself.
        space: fields of `SearchSpace`.
    """
    models = [CostModel(ModelShape.from_config(CONFIG), target.scenario, Roofline()) for target in targets]
    quality_loss = tuple(tuple(float(index) for index in range(len(row))) for row in layers)
    return build_program(layers, quality_loss, models, Constraints(list(targets), limits), SearchSpace(**space))
