"""The loss on packed batches: independent documents, shifted targets, top-k logits in place of the parent."""

import pytest
import torch
from helpers.distillation_runs import Models, make_models, random_documents
from helpers.live_bytes import LiveBytes
from torch.nn.functional import cross_entropy

from lit_puzzle.data.hidden_states import hidden_states
from lit_puzzle.distill.distillation_loss import distillation_loss, targets_before
from lit_puzzle.distill.losses import FullLogits, TopKLogits, head_loss
from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.model.loading import load_model

ALL = LossSettings(hidden=0.4, lm=0.2, temperature=1.5, chunk_tokens=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_config) -> Models:
    return make_models(tmp_path_factory.mktemp("objective"), tiny_config)


@pytest.fixture
def both(models):
    return [load_model(folder, "float32", "sink_attention") for folder in (models.child, models.parent)]


def packed(documents, tokens: int) -> dict[str, torch.Tensor]:
    """One row of documents and padding, made here by hand."""
    ids, positions, numbers, mask = list[int](), list[int](), list[int](), list[int]()
    for number, document in enumerate(documents):
        length = len(document.input_ids)
        ids += document.input_ids
        positions += range(length)
        numbers += [number] * length
        mask += document.loss_mask
    padding = tokens - len(ids)
    rows = [ids + [0] * padding, positions + list(range(padding)), numbers + [-1] * padding, mask + [0] * padding]
    names = ["input_ids", "position_ids", "document_ids", "loss_mask"]
    batch = {name: torch.tensor([row]) for name, row in zip(names, rows, strict=True)}
    return batch | {"loss_mask": batch["loss_mask"].bool()}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_a_packed_batch_is_the_sum_of_its_documents(both):
    """For a stock parent too, whose packed documents would attend each other; padding does not count."""
    child, parent = both
    documents = random_documents(4)
    terms = distillation_loss(child, parent, packed(documents, 64), ALL)
    terms.loss.backward()
    together = gradients(child)
    alone = [distillation_loss(child, parent, packed([d], len(d.input_ids)), ALL) for d in documents]
    torch.stack([t.loss for t in alone]).sum().backward()
    for ours, parts in zip(terms, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours.detach(), sum(parts).detach(), rtol=1e-5, atol=1e-5)
    for name, reference in gradients(child).items():
        torch.testing.assert_close(together[name], reference, rtol=1e-4, atol=1e-5, msg=name)
    assert int(terms.targets) == sum(sum(d.loss_mask) for d in documents)


def test_targets_are_predicted_by_the_token_before(both):
    """Transformers' own logits, the mask shifted by one, and the formulas on them."""
    child, parent = both
    document = random_documents(1)[0]
    terms = distillation_loss(child, parent, packed([document], 40), ALL)
    ids = torch.tensor([document.input_ids])
    first = document.loss_mask.index(1)
    logits = [m(input_ids=ids).logits[0, first - 1 : -1] for m in (child, parent)]
    lm = cross_entropy(logits[0], ids[0, first:], reduction="sum")
    assert float(terms.lm) == pytest.approx(lm.item(), rel=1e-5)
    log_q, log_p = ((z / 1.5).log_softmax(-1) for z in logits)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    assert float(terms.divergence) == pytest.approx(divergence.item(), rel=1e-4)
    states = [m(input_ids=ids, output_hidden_states=True).hidden_states[1:] for m in (child, parent)]
    cosines = [torch.cosine_similarity(c, p, dim=-1) for c, p in zip(*states, strict=True)]
    hidden = (1 - torch.stack(cosines)).sum() / len(cosines)
    assert float(terms.hidden) == pytest.approx(hidden.item(), rel=1e-4)
    weighted = 1.5**2 * divergence + 0.4 * hidden + 0.2 * lm
    assert terms.loss.item() == pytest.approx(weighted.item(), rel=1e-4)


def test_a_target_at_the_start_of_a_row_is_left_out():
    batch = {"loss_mask": torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()}
    assert targets_before(batch).tolist() == [[False, True, True, False], [True, False, False, False]]


def test_a_copy_of_the_parent_has_loss_zero(models):
    parent, copy = (load_model(models.parent, "float32", "sink_attention") for _ in range(2))
    terms = distillation_loss(copy, parent, packed(random_documents(3), 48), LossSettings(hidden=1.0))
    assert abs(float(terms.divergence)) < 1e-5 and abs(float(terms.hidden)) < 1e-5


def test_activation_checkpointing_changes_nothing_but_memory(both):
    child, parent = both
    batch = packed(random_documents(8), 160)
    plain, peak = {}, {}
    for name in ("plain", "checkpointed"):
        if name == "checkpointed":
            child.gradient_checkpointing_enable({"use_reentrant": False})
        child.train()
        with LiveBytes() as live:
            terms = distillation_loss(child, parent, batch, ALL)
        peak[name] = live.now
        terms.loss.backward()
        plain[name] = gradients(child)
    assert peak["checkpointed"] < 0.5 * peak["plain"]
    for name, reference in plain["plain"].items():
        torch.testing.assert_close(plain["checkpointed"][name], reference, rtol=1e-5, atol=1e-6, msg=name)


def test_logits_of_all_tokens_replace_the_parent(both):
    child, parent = both
    batch, settings = packed(random_documents(4), 64), LossSettings(lm=0.1)
    logits = parent.lm_head(hidden_states(parent, batch, [1])[0][targets_before(batch)]).log_softmax(-1)
    top, ids = logits.topk(127)
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1)
    ours = distillation_loss(child, TopKLogits(ids, top, rest), batch, settings)
    whole = distillation_loss(child, parent, batch, settings)
    assert float(ours.loss) == pytest.approx(float(whole.loss), rel=1e-4)


def test_the_last_layer_alone_gives_the_same_states(both):
    child, _ = both
    batch = packed(random_documents(2), 32)
    both_layers, last = hidden_states(child, batch, [0, 1]), hidden_states(child, batch, [1])
    assert len(last) == 1 and torch.equal(last[0], both_layers[1]) and not torch.equal(last[0], both_layers[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_memory_grows_with_length_and_not_with_its_square(both, checkpointing):
    child, parent = both
    settings = LossSettings(hidden=0.5, chunk_tokens=64)
    if checkpointing:
        child.gradient_checkpointing_enable({"use_reentrant": False})
    child.train()

    def peak(tokens: int) -> int:
        generator = torch.Generator().manual_seed(0)
        batch = {"input_ids": torch.randint(3, 120, (1, tokens), generator=generator)}
        batch["position_ids"], batch["document_ids"] = torch.arange(tokens)[None], torch.zeros(1, tokens).long()
        batch["loss_mask"] = torch.arange(tokens)[None] > 8
        with LiveBytes() as live:
            distillation_loss(child, parent, batch, settings).loss.backward()
        return live.peak

    sizes = [peak(tokens) for tokens in (512, 1024, 2048)]
    assert sizes[2] - sizes[1] < 2.3 * (sizes[1] - sizes[0])  # a square would give 4


def test_head_sees_the_rows_in_the_order_of_the_mask(both):
    """Two rows: the head gets the states row by row, in the order of `loss_mask.nonzero()`."""
    child, parent = both
    rows = [packed(random_documents(6)[i : i + 3], 64) for i in (0, 3)]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    settings = LossSettings(lm=1.0)
    states = [hidden_states(model, batch, [1])[0] for model in both]
    row_of, place_of = batch["loss_mask"].nonzero(as_tuple=True)
    known = FullLogits(states[1][row_of, place_of - 1], parent.lm_head.weight)
    tokens = batch["input_ids"][row_of, place_of]
    expected = head_loss(states[0][row_of, place_of - 1], child.lm_head.weight, known, tokens, settings)
    assert float(distillation_loss(child, parent, batch, settings).loss) == pytest.approx(
        float(expected.loss), rel=1e-6
    )
