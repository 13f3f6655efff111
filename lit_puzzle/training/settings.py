"""Settings of training a child, as recipes hold them: what trains, in which dtype, by which kernels. Imports no torch.

Reads and writes nothing. Source: arXiv 2602.11937 (what is frozen); LoRA, arXiv 2106.09685.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

Part = Literal["attention", "router", "attention_and_router"]  # keys of `parts` in lit_puzzle.model.family


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of full fine-tuning.

    Args:
        rank: inner dimension.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout on the adapter's input.
        target_modules: names of the linear layers and embeddings that get an adapter.
        target_parameters: names of further parameters that get one, such as `experts.down_proj` and `router.weight`.

    Raises:
        ValueError: numbers out of range, no target, or dropout with `target_parameters`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    target_parameters: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora.rank={self.rank}, alpha={self.alpha}, dropout={self.dropout} were given; rank >= 1, alpha > 0 "
                "and finite, and 0 <= dropout < 1 are needed."
            )
        if not self.target_modules and not self.target_parameters:
            raise ValueError("lora.target_modules and target_parameters are empty; at least one name is needed.")
        if self.target_parameters and self.dropout > 0:
            raise ValueError(
                f"lora.dropout={self.dropout} was given with target_parameters, which have no input to drop: set 0."
            )


@dataclass(frozen=True)
class TrainingSettings:
    """What of a child trains, and how models are loaded and computed.

    Args:
        freeze: patterns of parameters that are not trained; default: experts and router. Without effect with `lora`.
        trainable: trains this part alone, norms, embedding and head frozen too; None: everything that `freeze` leaves.
        lora: trains low-rank adapters instead; everything else is then frozen.
        gradient_checkpointing: recomputes the child's activations in backward.
        moe_chunk_tokens: tokens that router and experts of a layer take at a time, recomputed in backward; None: all.
            For long sequences: a layer of gpt-oss's shape keeps 0.2 MB less for each token of the others.
        dtype: dtype in which weights are loaded; those that train are kept in float32, because bfloat16 rounds away
            the steps of a small learning rate.
        attention: implementation of attention, by its name in transformers; `sink_attention` is linear in memory.
        experts: implementation of the experts.

    Raises:
        ValueError: chunks of no token, an unknown part, or a part beside `freeze` or `lora`.
    """

    freeze: list[str] | None = None
    trainable: Part | None = None
    lora: LoraSettings | None = None
    gradient_checkpointing: bool = False
    moe_chunk_tokens: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "sink_attention"
    experts: str = "grouped_mm"

    def __post_init__(self) -> None:
        if self.trainable is not None and self.trainable not in get_args(Part):
            raise ValueError(f"training.trainable is {self.trainable!r}; allowed: {list(get_args(Part))}, or null.")
        if self.trainable is not None and (self.freeze is not None or self.lora is not None):
            raise ValueError(
                f"training.trainable={self.trainable} was given beside freeze or lora, which also say what trains: set "
                "them to null (adapters of the router: lora.target_parameters: [router.weight])."
            )
        if self.moe_chunk_tokens is not None and self.moe_chunk_tokens < 1:
            raise ValueError(f"training.moe_chunk_tokens={self.moe_chunk_tokens} was given; 1 or more is needed.")
