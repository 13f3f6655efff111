"""The on-policy loss against the plain formula on whole sequences, one by one; only completion tokens count."""

from copy import deepcopy

import pytest
import torch

from lit_puzzle.data.packed_rows import packed_completions
from lit_puzzle.distill.on_policy_loss import on_policy_loss
from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.generation.engine import Completion

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]
COMPLETIONS = [[20, 21], [22, 23, 24, 25, 2], [26], [27, 28, 2]]


@pytest.fixture
def pair(tiny_model, tiny_config):
    """A parent, and a child that is another model of its shape; both float64."""
    tiny_model.set_experts_implementation("eager")  # grouped products have no float64
    child = deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return child.double(), tiny_model.double().requires_grad_(False)


def completions(logprobs: bool = False) -> list[Completion]:
    return [Completion(ids, "stop", [-1.0 - i for i in range(len(ids))] if logprobs else None) for ids in COMPLETIONS]


def plainly(child, parent, settings: LossSettings, top_k: int | None) -> torch.Tensor:
    """Sequence by sequence, without packing or chunks."""
    total, tau, beta = torch.zeros((), dtype=torch.float64), settings.temperature, settings.beta
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([prompt + completion])
        places = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        z_c, z_p = (model(input_ids=ids).logits[0, places] for model in (child, parent))
        q, p = (z_c / tau).softmax(-1), (z_p / tau).softmax(-1)
        if top_k is not None:
            kept = p.topk(top_k).indices
            q, p = (torch.cat([x.gather(1, kept), 1 - x.gather(1, kept).sum(1, keepdim=True)], 1) for x in (q, p))
        forward, reverse = (p * (p.log() - q.log())).sum(), (q * (q.log() - p.log())).sum()
        total = total + tau**2 * (beta * forward + (1 - beta) * reverse)
    return total


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (2.0, None), (1.0, 5)])
def test_the_loss_and_its_gradients_are_those_of_single_sequences(pair, temperature, top_k):
    child, parent = pair
    settings = LossSettings("kl_mix", beta=0.3, temperature=temperature, chunk_tokens=3)
    batch = packed_completions(PROMPTS, completions())
    terms, log_probs = on_policy_loss(child, parent, batch, settings, top_k)
    assert log_probs is None and int(terms.targets) == sum(map(len, COMPLETIONS))
    terms.loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in child.named_parameters() if parameter.grad is not None}
    child.zero_grad()
    expected = plainly(child, parent, settings, top_k)
    expected.backward()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-6, atol=1e-9)
    for name, parameter in child.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-6 * scale, msg=name)


def test_log_probabilities_of_sampled_tokens_are_the_childs(pair):
    child, parent = pair
    batch = packed_completions(PROMPTS, completions(logprobs=True))
    _, log_probs_N = on_policy_loss(child, parent, batch, LossSettings("kl_mix", chunk_tokens=4), None)
    found = torch.zeros(batch["loss_mask"].shape, dtype=torch.float64)
    assert log_probs_N is not None
    found[batch["loss_mask"]] = log_probs_N
    for place, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            logits = child(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        own = (batch["document_ids"] == place) & batch["loss_mask"]
        torch.testing.assert_close(found[own], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(batch["logprobs"][own], torch.tensor([-1.0 - i for i in range(len(completion))]))
