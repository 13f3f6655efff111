"""What token ids mean: whose they are, and whether two models mean the same by them.

Reads checkpoint folders (configuration and tokenizer); writes nothing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.opening import load_config, load_tokenizer


@dataclass(frozen=True)
class Provenance:
    """Who wrote the tokens and what they may be: what has to agree with whoever reads them.

    Attributes:
        fingerprint: Of the parent's checkpoint.
        tokenizer: `tokenizer_hash` of its tokenizer.
        vocab_size: Token ids are below.
        context_tokens: No document is longer.
    """

    fingerprint: str
    tokenizer: str
    vocab_size: int
    context_tokens: int

    @classmethod
    def of(cls, parent: Path) -> "Provenance":
        """Read a checkpoint folder: its configuration, tokenizer, and the pages its fingerprint covers."""
        return cls(fingerprint(parent), *read_limits(parent))


def read_limits(parent: Path) -> tuple[str, int, int]:
    """`tokenizer_hash`, size of the vocabulary and context of a checkpoint folder."""
    config = load_config(parent)
    tokenizer = load_tokenizer(parent)
    return tokenizer_hash(tokenizer), int(config.vocab_size), int(config.max_position_embeddings)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sha256 of the vocabulary (token -> id, added tokens included): equal when token ids mean the same."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
