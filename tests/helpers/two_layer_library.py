"""A library of two layers of four experts: both may keep two experts, the second may also have a window."""

from lit_puzzle.library.library import Candidate, Library
from lit_puzzle.spec import BlockSpec

CONFIG = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
ALL, HALF = (0, 1, 2, 3), (1, 2)
LIBRARY = Library(
    "parent",
    4,
    CONFIG,
    (
        (Candidate("parent", BlockSpec(ALL, 8)), Candidate("experts=2", BlockSpec(HALF, 8))),
        (
            Candidate("parent", BlockSpec(ALL, None)),
            Candidate("experts=2", BlockSpec(HALF, None)),
            Candidate("window=8", BlockSpec(ALL, 8)),
            Candidate("experts=2,window=8", BlockSpec(HALF, 8)),
        ),
    ),
)
