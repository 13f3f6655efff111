"""The loss of global distillation on one packed batch: forward passes of child and parent, and the terms of the loss.

Reads batches of `lit_puzzle.data.documents`; writes nothing. Formulas, and memory of the head:
`lit_puzzle.distill.losses`. Memory of the bodies, L layers: parent b B T D while it runs (times L if hidden states are
distilled); child c L b B T D for its backward pass, with activation checkpointing (L + 2 c) b B T D; c is about 32 on
the tiny model.

Shapes: B rows, T tokens of a row, D hidden channels, N targets.
"""

from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.data.hidden_states import hidden_states, release
from lit_puzzle.distill.losses import FullLogits, TopKLogits, head_loss, hidden_distance
from lit_puzzle.distill.settings import LossSettings


class LossTerms(NamedTuple):
    """Sums over a batch: `loss` has a gradient and is the weighted sum of the others; `hidden` is over all tokens."""

    loss: Tensor
    divergence: Tensor
    hidden: Tensor
    lm: Tensor
    targets: Tensor

    def detached(self) -> "LossTerms":
        """Return the terms without gradients, in float64."""
        return LossTerms(*(term.detach().double() for term in self))

    def plus(self, other: "LossTerms") -> "LossTerms":
        """Return the sums over both batches."""
        return LossTerms(*(a + b for a, b in zip(self, other.detached(), strict=True)))

    def over_processes(self, trainer: Trainer) -> "LossTerms":
        """Return the sums over all processes, on each."""
        return LossTerms(*trainer.strategy.reduce(torch.stack(list(self)), reduce_op="sum"))

    def per_target(self) -> dict[str, float]:
        """Return loss, divergence, hidden and lm divided by the number of targets."""
        targets = max(float(self.targets), 1.0)
        return {name: float(term.detach()) / targets for name, term in self._asdict().items() if name != "targets"}


def no_terms(device: torch.device) -> LossTerms:
    """Return sums over nothing."""
    return LossTerms(*torch.zeros(5, dtype=torch.float64, device=device))


def distillation_loss(
    child: PreTrainedModel, parent: PreTrainedModel | TopKLogits, batch: PackedBatch, settings: LossSettings
) -> LossTerms:
    """Run both models on a batch and return the terms of the loss.

    Args:
        child: model that is trained.
        parent: a model, or its top-k logits at the targets of the batch, in the order of `targets_before`.
        batch: packed batch.
        settings: terms and weights.
    """
    last = child.config.num_hidden_layers - 1
    layers = list(range(last + 1)) if settings.hidden > 0 else [last]
    before_BT = targets_before(batch)
    if isinstance(parent, PreTrainedModel):
        with torch.no_grad():
            parent_LBTD = hidden_states(parent, batch, layers)
            logits: FullLogits | TopKLogits = FullLogits(parent_LBTD[-1][before_BT], parent.lm_head.weight)
    else:
        parent_LBTD, logits = [], parent
    child_LBTD = hidden_states(child, batch, layers)
    tokens_N = batch["input_ids"][:, 1:][before_BT[:, :-1]]
    head = head_loss(child_LBTD[-1][before_BT], child.lm_head.weight, logits, tokens_N, settings)
    if isinstance(parent, PreTrainedModel):
        release(parent)
    loss, hidden = head.loss, torch.zeros_like(head.divergence)
    if settings.hidden > 0:
        distance_BT = hidden_distance(child_LBTD, parent_LBTD, settings.weight_of_layers(last + 1))
        hidden = (distance_BT * (batch["document_ids"] >= 0)).sum()
        loss = loss + settings.hidden * hidden
    return LossTerms(loss, head.divergence, hidden.detach(), head.lm, before_BT.sum())


def targets_before(batch: PackedBatch) -> Tensor:
    """Return (B, T): whether the next token of the same row is a target, so that the states here predict it."""
    before_BT = torch.zeros_like(batch["loss_mask"], dtype=torch.bool)
    before_BT[:, :-1] = batch["loss_mask"][:, 1:] > 0
    return before_BT
