"""Prompts and their completions as one packed batch, in memory: the completions are the targets.

As many sequences as fit lie behind one another in a row, whose length is that of the longest; they do not attend each
other (`lit_puzzle.data.packing`). Reads and writes nothing. Memory: the batch.

Shapes: B rows, T tokens of a row.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.data.packing import pack, restarting_positions
from lit_puzzle.generation.engine import Completion


def packed_completions(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> PackedBatch:
    """Return the packed batch of some completions; its `document_ids` are their places.

    Args:
        prompts: token ids of each prompt, at least one.
        completions: of these prompts.

    Returns:
        A packed batch, with `logprobs` (B, T) if the completions have them: of each target, 0 elsewhere.
    """
    rows = [[*prompt, *completion.token_ids] for prompt, completion in zip(prompts, completions, strict=True)]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = int(lengths.max())
    sequences, starts = (places.tolist() for places in pack(lengths, longest, "first_fit"))
    shape = (max(sequences) + 1, longest)
    ids_BT, mask_BT = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    documents_BT, logprobs_BT = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
    for place, (row, sequence, start) in enumerate(zip(rows, sequences, starts, strict=True)):
        end, first = start + len(row), start + len(prompts[place])
        ids_BT[sequence, start:end], documents_BT[sequence, start:end] = row, place
        mask_BT[sequence, first:end] = True
        logprobs_BT[sequence, first:end] = completions[place].logprobs or 0.0
    document_ids_BT = torch.from_numpy(documents_BT)
    batch = {
        "input_ids": torch.from_numpy(ids_BT),
        "position_ids": restarting_positions(document_ids_BT),
        "document_ids": document_ids_BT,
        "loss_mask": torch.from_numpy(mask_BT),
    }
    known = all(completion.logprobs is not None for completion in completions)
    return batch | ({"logprobs": torch.from_numpy(logprobs_BT)} if known else {})
