"""The two kinds of token batches; B rows, T tokens of a row. Reads and writes nothing.

A packed batch has several documents in a row, each entry (B, T):
    input_ids      token ids, 0 on padding
    position_ids   from 0 in each document, and in the padding
    document_ids   number of the document in its folder, -1 on padding
    loss_mask      True: the token is a target, predicted from the one before

A padded batch has one sequence in a row, padded at its end, each entry (B, T):
    input_ids        token ids, 0 on padding
    attention_mask   1 on tokens, 0 on padding
    scored_mask      True on tokens that count; a stage may take the attention mask in its place
"""

from collections.abc import Mapping

from torch import Tensor

PackedBatch = Mapping[str, Tensor]
PaddedBatch = Mapping[str, Tensor]
