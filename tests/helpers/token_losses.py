"""The quality loss of single tokens by the definitions, in float64, to test the chunked one against."""

import torch
from torch import Tensor

from lit_puzzle.scoring.block_quality import NO_TOKEN


def token_losses(parent_TD: Tensor, child_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Return every metric of every token, in the order of `METRICS`.

    Args:
        parent_TD: final hidden states of the parent.
        child_TD: those of the child.
        head_VD: the output head of both.
        targets_T: next tokens, `NO_TOKEN` where there is none.
    """
    parent_TD, child_TD, head_VD = parent_TD.double(), child_TD.double(), head_VD.double()
    p_TV, q_TV = torch.softmax(parent_TD @ head_VD.T, -1), torch.softmax(child_TD @ head_VD.T, -1)
    middle_TV = (p_TV + q_TV) / 2
    kl = (p_TV * (p_TV / q_TV).log()).sum(-1)
    js = ((p_TV * (p_TV / middle_TV).log()).sum(-1) + (q_TV * (q_TV / middle_TV).log()).sum(-1)) / 2
    rows = torch.arange(len(p_TV))
    increase = torch.where(targets_T == NO_TOKEN, 0.0, p_TV[rows, targets_T].log() - q_TV[rows, targets_T].log())
    cosine = 1 - torch.nn.functional.cosine_similarity(parent_TD, child_TD)
    disagree = (p_TV.argmax(-1) != q_TV.argmax(-1)).double()
    return torch.stack([((parent_TD - child_TD) ** 2).mean(-1), cosine, kl, js, increase, disagree], dim=1)
