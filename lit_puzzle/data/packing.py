"""Packing documents into sequences of one length, and the model inputs that keep documents from attending each other.

Each document lies whole in one sequence. Efficiency = tokens of documents / (sequences * tokens of a sequence).

    sequential   a document goes behind the one before it, or opens a new sequence where it does not fit
    first_fit    a document goes into the first sequence with room for it (a tree of the largest room: log S steps each)

Boundaries: positions start again at 0 with each document, and padding at the end of a sequence counts as one more
document. transformers tells documents apart by that only where a model passes positions on to its masks and gets no
`attention_mask`: children pass them on, stock models do not. `model_inputs` gives each what it needs.

Memory: 90 bytes a document. Source: first fit, D. S. Johnson, "Near-optimal bin packing algorithms", 1973.

Shapes: D documents, S sequences, B sequences of a batch, T tokens of a sequence.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.data.packing_settings import PackingMethod
from lit_puzzle.model.modules import model_family

Integers = NDArray[np.int64]


def pack(lengths_D: Integers, sequence_tokens: int, method: PackingMethod) -> tuple[Integers, Integers]:
    """Place documents, taken in the order given.

    Args:
        lengths_D: tokens of each document, 1 to `sequence_tokens`.
        sequence_tokens: tokens of a sequence.
        method: how they are placed.

    Returns:
        (D) the sequence of each document and (D) the place of its first token there.
    """
    if method == "sequential":
        return _sequential(lengths_D, sequence_tokens)
    return _first_fit(lengths_D, sequence_tokens)


def _sequential(lengths_D: Integers, sequence_tokens: int) -> tuple[Integers, Integers]:
    sequences_D, starts_D = np.empty_like(lengths_D), np.empty_like(lengths_D)
    sequence, used = 0, 0
    for document, length in enumerate(lengths_D.tolist()):
        if used + length > sequence_tokens:
            sequence, used = sequence + 1, 0
        sequences_D[document], starts_D[document] = sequence, used
        used += length
    return sequences_D, starts_D


def _first_fit(lengths_D: Integers, sequence_tokens: int) -> tuple[Integers, Integers]:
    sequences_D, starts_D = np.empty_like(lengths_D), np.empty_like(lengths_D)
    leaves = 1 << max(len(lengths_D) - 1, 0).bit_length()
    room = [sequence_tokens] * (2 * leaves)  # a binary tree: node n has the larger room of nodes 2 n and 2 n + 1
    for document, length in enumerate(lengths_D.tolist()):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        sequences_D[document], starts_D[document] = node - leaves, sequence_tokens - room[node]
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sequences_D, starts_D


def restarting_positions(document_ids_BT: Tensor) -> Tensor:
    """Return positions (B, T) that start at 0 with every run of equal document numbers."""
    places_BT = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device).expand_as(document_ids_BT)
    begins_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return places_BT - torch.where(begins_BT, places_BT, 0).cummax(dim=1).values


def model_inputs(model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    """Return arguments of `model(**...)` or `model.model(**...)` with which packed documents do not attend each other.

    Args:
        model: causal language model of a parent or a child, inside any LoRA wrapper.
        batch: `input_ids` and `position_ids`, each (B, T).

    Raises:
        ValueError: a model of no known family.
    """
    positions_BT = batch["position_ids"]
    is_child = model.config.model_type == model_family(model).child.model_type
    mask = None if is_child else _stock_masks(model, positions_BT)
    return {
        "input_ids": batch["input_ids"],
        "position_ids": positions_BT,
        "attention_mask": mask,
        "use_cache": False,
    }


def _stock_masks(model: PreTrainedModel, positions_BT: Tensor) -> dict[str, Any]:
    """Return one mask for each type of layer, which stock models use unchanged."""
    shape_BT0 = torch.empty(*positions_BT.shape, 0, dtype=model.dtype, device=positions_BT.device)
    arguments = model.config, shape_BT0, None, None, positions_BT
    return {
        "full_attention": create_causal_mask(*arguments),
        "sliding_attention": create_sliding_window_causal_mask(*arguments),
    }
