"""Packing documents into sequences of one length, and what a model must be told so that they do not see each other.

Each document lies whole in one sequence. Efficiency = tokens of documents / (sequences * tokens of a sequence).

    sequential   a document goes behind the one before it, or opens a new sequence where it does not fit
    first_fit    a document goes into the first sequence with room for it (a tree of the largest room: log S steps each)

Boundaries: positions start again at 0 with each document, and padding at the end of a sequence counts as one more
document. transformers tells documents apart by that only where a model passes positions on to its masks and gets no
`attention_mask`: gpt_oss_puzzle does pass them on, stock gpt-oss does not. `model_inputs` gives each what it needs.

Memory: 90 bytes a document. Source: first fit, D. S. Johnson, "Near-optimal bin packing algorithms", 1973.

Shapes: D documents, S sequences, B sequences of a batch, T tokens of a sequence.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

PackingName = Literal["first_fit", "sequential"]
Integers = NDArray[np.int64]


def pack(lengths_D: Integers, sequence_tokens: int, packing: PackingName) -> tuple[Integers, Integers]:
    """Places documents, taken in the order given.

    Args:
        lengths_D: Tokens of each document, 1 to `sequence_tokens`.
        sequence_tokens: Tokens of a sequence.
        packing: How.

    Returns:
        (D) the sequence of each document and (D) the place of its first token there.
    """
    if packing == "sequential":
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
    """Positions (B, T) that start at 0 with every run of equal document numbers."""
    places_BT = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device).expand_as(document_ids_BT)
    begins_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return places_BT - torch.where(begins_BT, places_BT, 0).cummax(dim=1).values


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `model(**...)` or `model.model(**...)` takes so that documents of a packed batch do not see each other.

    Args:
        model: The causal language model inside any LoRA wrapper, stock gpt-oss or gpt_oss_puzzle.
        batch: `input_ids` and `position_ids`, each (B, T).

    Raises:
        ValueError: Another kind of model: how it tells documents apart is not known.
    """
    kind, positions_BT = model.config.model_type, batch["position_ids"]
    if kind not in ("gpt_oss", "gpt_oss_puzzle"):
        raise ValueError(
            f"A {kind!r} model was given; packed documents are known to work with gpt_oss, gpt_oss_puzzle."
        )
    mask = None if kind == "gpt_oss_puzzle" else _stock_masks(model, positions_BT)
    return {
        "input_ids": batch["input_ids"],
        "position_ids": positions_BT,
        "attention_mask": mask,
        "use_cache": False,
    }


def _stock_masks(model: PreTrainedModel, positions_BT: Tensor) -> dict[str, Any]:
    """One mask for each type of layer, which stock gpt-oss takes as they are."""
    shape_BT0 = torch.empty(*positions_BT.shape, 0, dtype=model.dtype, device=positions_BT.device)
    arguments = model.config, shape_BT0, None, None, positions_BT
    return {
        "full_attention": create_causal_mask(*arguments),
        "sliding_attention": create_sliding_window_causal_mask(*arguments),
    }
