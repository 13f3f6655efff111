"""GRPO written a second time, from the papers' formulas and token ids alone, for tests to compare with.

End token 2, padding token 0. Shapes: B completions of a slice, N of a generation batch, P prompt, C completion tokens.
Source: arXiv 2402.03300, 2503.14476, 2503.20783, 2512.02556.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lit_puzzle.rl.settings import GRPOSettings


def token_log_probs(model: Any, prompt_BP: Tensor, mask_BP: Tensor, completion_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """log p of every completion token, from full logits."""
    ids, mask = torch.cat([prompt_BP, completion_BC], 1), torch.cat([mask_BP, mask_BC], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, prompt_BP.shape[1] - 1 : -1]
    return log_softmax(logits.float(), -1).gather(-1, completion_BC[..., None])[..., 0]


def independent_grpo_loss(
    policy: Any,
    start: Any,
    batch: list[dict[str, Any]],
    index: int,
    settings: GRPOSettings,
    accumulate: int,
    reward: Callable[..., list[float]],
) -> tuple[Tensor, float]:
    """GRPO from the papers' formulas and token ids alone: loss of slice `index`, and the share of clipped tokens.

    Symbols: r importance ratio, A advantage, m mask, T tokens of a completion, cap the longest allowed completion.
        token loss  l = -min(r A, clip(r, 1 - eps, 1 + eps_high) A) + beta r k,   k = exp(d) - d - 1,  d = log q - log p
                    (q: the policy at the start; the factor r makes the KL gradient unbiased, arXiv 2512.02556)
        grpo        mean over completions of (sum m l / T)
        dr_grpo     sum m l / (completions * cap)
        dapo        sum m l / (tokens of the generation batch / updates made of it)
        bnpo        sum m l / (tokens of the slice)
    """
    rows = [row for part in batch for row in zip(part["prompt_ids"], part["completion_ids"], strict=True)]
    lengths, truncated, rewards, groups = [], [], [], []
    for prompt, completion in rows:
        ids = completion.tolist()
        ended = 2 in ids
        length = ids.index(2) + 1 if ended else len(ids)
        lengths.append(length)
        truncated.append(not ended and ids[-1] != 0)
        rewards.append(reward(completion_ids=[ids[:length]])[0])
        groups.append(tuple(prompt.tolist()))
    advantages = []
    for own, group in zip(rewards, groups, strict=True):
        peers = torch.tensor([r for r, g in zip(rewards, groups, strict=True) if g == group])
        assert len(peers) == settings.num_generations
        spread = {"group": peers.std(), "batch": torch.tensor(rewards).std(), "none": None}[settings.loss.scale_rewards]
        centred = own - peers.mean()
        advantages.append(centred if spread is None else centred / (spread + 1e-4))

    width = rows[0][1].shape[0]
    mask_NC = torch.tensor([[float(column < length) for column in range(width)] for length in lengths])
    if settings.loss.mask_truncated_completions:
        mask_NC = mask_NC * (1 - torch.tensor(truncated).float())[:, None]
    size = settings.completions_per_device
    own_rows = slice(index * size, (index + 1) * size)
    prompt_BP = torch.stack([prompt for prompt, _ in rows[own_rows]])
    completion_BC = torch.stack([completion for _, completion in rows[own_rows]])
    mask_BC, A_B1 = mask_NC[own_rows], torch.stack(advantages)[own_rows, None]

    inputs = (prompt_BP, (prompt_BP != 0).long(), completion_BC, mask_BC.long())
    log_p = token_log_probs(policy, *inputs)
    with torch.no_grad():
        log_start = token_log_probs(start, *inputs)
    log_ratio = log_p - log_start
    if settings.loss.importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask_BC).sum(1) / mask_BC.sum(1).clamp(min=1))[:, None].expand_as(log_p)
    ratio = log_ratio.exp()
    low, high = 1 - settings.loss.epsilon, 1 + (settings.loss.epsilon_high or settings.loss.epsilon)
    clipped = ratio.clamp(low, high)
    loss_BC = -torch.minimum(ratio * A_B1, clipped * A_B1)
    distance = log_start - log_p
    loss_BC = loss_BC + settings.loss.beta * ratio * (distance.exp() - distance - 1)
    total = (loss_BC * mask_BC).sum()
    tokens = mask_NC.sum().clamp(min=1)
    losses = {
        "grpo": ((loss_BC * mask_BC).sum(1) / mask_BC.sum(1).clamp(min=1)).mean() / accumulate,
        "dr_grpo": total / (size * settings.sampling.max_new_tokens) / accumulate,
        "dapo": total / (tokens / (len(batch) / accumulate)),
        "bnpo": total / mask_BC.sum().clamp(min=1) / accumulate,
    }
    share = float(((ratio != clipped) * mask_BC).sum() / mask_BC.sum().clamp(min=1))
    return losses[settings.loss.loss_type], share
