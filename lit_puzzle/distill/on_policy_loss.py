"""The loss of on-policy distillation on one packed batch of sampled completions.

    loss = sum over completion tokens of a tau^2 D(child, parent)      D as in `lit_puzzle.distill.losses`

The tokens are the child's own; they are fixed, so no gradient goes through the sampling. Divided by the mean number of
completion tokens of a batch of the rollout, over all processes, by the module: the mean over tokens of what the child
samples now. Reads and writes nothing. Memory: `lit_puzzle.distill.distillation_loss`, without hidden states; with top-k
logits, 12 K bytes a token in place of the parent's states and head.

Shapes: B rows, T tokens of a row, D hidden channels, N completion tokens, K top-k logits.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.data.hidden_states import hidden_states, release
from lit_puzzle.distill.distillation_loss import LossTerms, targets_before
from lit_puzzle.distill.losses import FullLogits, TopKLogits, exact_logits, head_loss, token_log_probs
from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.distill.top_logits import top_of


def on_policy_loss(
    child: PreTrainedModel, parent: PreTrainedModel, batch: PackedBatch, settings: LossSettings, top_k: int | None
) -> tuple[LossTerms, Tensor | None]:
    """Run both models on a batch; return the terms of the loss, and the child's log-probabilities of the tokens.

    Args:
        child: model that is trained.
        parent: model whose distributions are the targets.
        batch: packed completions (`lit_puzzle.data.packed_rows`).
        settings: kind and weight of the divergence.
        top_k: tokens of the parent that are compared; None: all.

    Returns:
        The terms, and the log-probabilities (N) where the batch has those of an engine to compare with, else None.
    """
    before_BT = targets_before(batch)
    logits = parent_logits(parent, batch, before_BT, settings.chunk_tokens, top_k)
    (child_BTD,) = hidden_states(child, batch, [child.config.num_hidden_layers - 1])
    hidden_ND, head_VD = child_BTD[before_BT], child.lm_head.weight
    tokens_N = batch["input_ids"][:, 1:][before_BT[:, :-1]]
    log_probs_N = None
    if "logprobs" in batch:
        log_probs_N = token_log_probs(hidden_ND.detach(), head_VD.detach(), tokens_N, settings.chunk_tokens)
    head = head_loss(hidden_ND, head_VD, logits, tokens_N, settings)
    release(parent)
    zero = torch.zeros_like(head.divergence)
    return LossTerms(head.loss, head.divergence, zero, zero, before_BT.sum()), log_probs_N


def parent_logits(
    parent: PreTrainedModel, batch: PackedBatch, before_BT: Tensor, chunk_tokens: int, top_k: int | None
) -> FullLogits | TopKLogits:
    """Return the parent's logits at the targets: as states and head, or the largest of them, chunk by chunk."""
    with torch.no_grad():
        (parent_BTD,) = hidden_states(parent, batch, [parent.config.num_hidden_layers - 1])
        hidden_ND = parent_BTD[before_BT]
        if top_k is None:
            return FullLogits(hidden_ND, parent.lm_head.weight)
        chunks = [
            top_of(exact_logits(hidden_CD, parent.lm_head.weight), top_k) for hidden_CD in hidden_ND.split(chunk_tokens)
        ]
        release(parent)
        return TopKLogits(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
