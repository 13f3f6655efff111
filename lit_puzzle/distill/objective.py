"""The objective of global distillation on one packed batch: which states, which targets, which parent.

Reads batches of `lit_puzzle.data.documents`; writes nothing. Formulas and memory of the head are in
`lit_puzzle.distill.losses`; of the bodies, with L layers: parent b B T D while it runs (each layer's states stay if
hidden states are distilled), child c L b B T D for its backward pass, with activation checkpointing (L + 2 c) b B T D,
c about 32 on the tiny model.

Shapes: B rows, T tokens of a row, D hidden channels, N targets.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.data.hidden_states import hidden_states, release
from lit_puzzle.distill.losses import FullParent, LossSettings, TopParent, head_loss, hidden_distance

Batch = Mapping[str, Tensor]


class Terms(NamedTuple):
    """Sums over a batch: `loss` has a gradient and is the weighted sum of the rest; `hidden` is over all tokens."""

    loss: Tensor
    divergence: Tensor
    hidden: Tensor
    lm: Tensor
    targets: Tensor

    def detached(self) -> "Terms":
        """The numbers, in float64."""
        return Terms(*(term.detach().double() for term in self))

    def plus(self, other: "Terms") -> "Terms":
        """Sums over both."""
        return Terms(*(a + b for a, b in zip(self, other.detached(), strict=True)))

    def over_processes(self, trainer: Trainer) -> "Terms":
        """Sums over all processes, on each."""
        return Terms(*trainer.strategy.reduce(torch.stack(list(self)), reduce_op="sum"))

    def per_target(self) -> dict[str, float]:
        """Means over targets: loss, divergence, hidden (each token's distance counted for the targets), lm."""
        targets = max(float(self.targets), 1.0)
        return {name: float(term.detach()) / targets for name, term in self._asdict().items() if name != "targets"}


def no_terms(device: torch.device) -> Terms:
    """Sums over nothing."""
    return Terms(*torch.zeros(5, dtype=torch.float64, device=device))


def distillation_terms(
    child: PreTrainedModel, parent: PreTrainedModel | TopParent, batch: Batch, settings: LossSettings
) -> Terms:
    """Runs both models and sums up what the child has to learn.

    Args:
        child: gets gradients where it trains.
        parent: a model, or its best tokens at the targets of the batch, in the order of `targets_before`.
        batch: `input_ids`, `position_ids`, `loss_mask` and `document_ids` (-1 on padding), each (B, T).
        settings: the parts of the loss.
    """
    last = child.config.num_hidden_layers - 1
    layers = list(range(last + 1)) if settings.hidden > 0 else [last]
    before_BT = targets_before(batch)
    if isinstance(parent, PreTrainedModel):
        with torch.no_grad():
            parent_LBTD = hidden_states(parent, batch, layers)
            known: FullParent | TopParent = FullParent(parent_LBTD[-1][before_BT], parent.lm_head.weight)
    else:
        parent_LBTD, known = [], parent
    child_LBTD = hidden_states(child, batch, layers)
    tokens_N = batch["input_ids"][:, 1:][before_BT[:, :-1]]
    head = head_loss(child_LBTD[-1][before_BT], child.lm_head.weight, known, tokens_N, settings)
    if isinstance(parent, PreTrainedModel):
        release(parent)
    loss, hidden = head.loss, torch.zeros_like(head.divergence)
    if settings.hidden > 0:
        distance_BT = hidden_distance(child_LBTD, parent_LBTD, settings.weight_of_layers(last + 1))
        hidden = (distance_BT * (batch["document_ids"] >= 0)).sum()
        loss = loss + settings.hidden * hidden
    return Terms(loss, head.divergence, hidden.detach(), head.lm, before_BT.sum())


def targets_before(batch: Batch) -> Tensor:
    """(B, T): whether the next token of the same row is a target, so that the states here predict it."""
    before_BT = torch.zeros_like(batch["loss_mask"], dtype=torch.bool)
    before_BT[:, :-1] = batch["loss_mask"][:, 1:] > 0
    return before_BT
