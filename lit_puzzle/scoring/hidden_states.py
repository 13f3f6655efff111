"""Hidden states of all tokens of a pass, in memory or in one memory-mapped file.

Writes and reads a scratch file, whose content a resumed run does not need. Source: this project's own.
Memory or disk: tokens x channels x bytes per number; of a file, the page cache holds what fits.
"""

import math
from pathlib import Path

import torch
from torch import Tensor


def hold(tokens: int, channels: int, dtype: torch.dtype, file: Path | None) -> Tensor:
    """Allocate the hidden states of `tokens` tokens on the CPU.

    Args:
        tokens: rows.
        channels: columns.
        dtype: dtype of the numbers.
        file: file that holds them, overwritten if it exists; None: in memory.

    Returns:
        Shape (tokens, channels), uninitialized.
    """
    if file is None or tokens == 0:
        return torch.empty(tokens, channels, dtype=dtype)
    file.unlink(missing_ok=True)  # another mapping of the old file stays whole
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = torch.from_file(str(file), shared=True, size=tokens * channels, dtype=dtype)
    return flat.view(tokens, channels)


def bytes_of(tokens: int, channels: int, dtype: torch.dtype) -> int:
    """Return the bytes that `hold` takes."""
    return math.prod((tokens, channels, dtype.itemsize))
