"""Token lists of unequal length as one rectangle. Reads and writes nothing. Shapes: B rows, T tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return (ids_BT, mask_BT), padded on the left so that all rows end in one column."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids_BT, mask_BT
