"""Settings of the tiny parent, as its recipe holds them: sizes, initialization, curriculum. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lit_puzzle.environments.environment import effort_weights
from lit_puzzle.tiny.world import TABLE_SIZE


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention, by the names of GptOssConfig; every other layer has the window, layer 0 first.

    Args:
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads.
        head_dim: channels of a head.
        sliding_window: window in tokens.
    """

    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    sliding_window: int = 16


@dataclass(frozen=True)
class ParentShape:
    """Sizes of the parent, by the names of GptOssConfig.

    Args:
        num_hidden_layers: layers.
        hidden_size: hidden channels.
        intermediate_size: channels inside an expert.
        num_local_experts: experts of a layer.
        num_experts_per_tok: experts that the router chooses for a token.
        attention: sizes of the attention.
        vocab_size: size of the vocabulary; at least that of the tokenizer.
        max_position_embeddings: longest context in tokens.
    """

    num_hidden_layers: int = 6
    hidden_size: int = 96
    intermediate_size: int = 64
    num_local_experts: int = 16
    num_experts_per_tok: int = 2
    attention: AttentionShape = AttentionShape()
    vocab_size: int = 128
    max_position_embeddings: int = 131072


@dataclass(frozen=True)
class Initialization:
    """Weights at the start of training.

    Args:
        matrix_std: standard deviation of all matrices except the embedding.
        embedding_std: standard deviation of the embedding.
        letter_share: correlation of the vectors (embedding and head) of the tokens of one letter.
        looks_back: for each head of a windowed layer, repeated, how many tokens back it attends.
        positional_bias: size of the biases that make heads attend there; 0 for none.
    """

    matrix_std: float = 0.05
    embedding_std: float = 1.0
    letter_share: float = 0.8
    looks_back: tuple[int, ...] = (1, 2, 3, 4)
    positional_bias: float = 5.0


@dataclass(frozen=True)
class Curriculum:
    """Lengths of the phases of the lessons, and the contents of a batch.

    Args:
        retrieval_steps: steps of the first phase.
        practice_steps: steps of the second phase; all steps after it are supervised.
        first_entries: definitions in a table at the first step; it grows to all 16 over 90% of the first phase.
        sequences: sequences of a batch; families take turns.
        sequence_tokens: longest sequence of the second and third phase.
        efforts: weight of each effort in the third phase.

    Raises:
        ValueError: a number out of range, or wrong efforts.
    """

    retrieval_steps: int = 110
    practice_steps: int = 60
    first_entries: int = 3
    sequences: int = 32
    sequence_tokens: int = 192
    efforts: Mapping[str, float] = field(default_factory=lambda: {"low": 1.0, "medium": 1.0, "high": 1.0})

    def __post_init__(self) -> None:
        effort_weights(self.efforts)
        if min(self.retrieval_steps, self.practice_steps) < 0 or self.sequences < 1 or self.sequence_tokens < 128:
            raise ValueError(f"{self}: steps must be >= 0, sequences >= 1, sequence_tokens >= 128.")
        if not 1 <= self.first_entries <= TABLE_SIZE:
            raise ValueError(f"first_entries {self.first_entries} must be between 1 and {TABLE_SIZE}.")

    def entries(self, step: int) -> int:
        """Return the number of definitions in a table at a step of the first phase."""
        grown = (TABLE_SIZE - self.first_entries + 1) * step / max(0.9 * self.retrieval_steps, 1.0)
        return min(TABLE_SIZE, self.first_entries + int(grown))
