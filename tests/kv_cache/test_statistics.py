"""Counted keys and values against k_proj, v_proj and RoPE computed by hand; scales against every value."""

import math

import pytest
import torch
from helpers.keys_and_values import keys_and_values
from helpers.present import present
from torch import Tensor

from lit_puzzle.data.packing import model_inputs, restarting_positions
from lit_puzzle.kv_cache.settings import ScaleSettings
from lit_puzzle.kv_cache.statistics import KVStatistics, apply_scales, find_scales, recording
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM

IDS = torch.randint(3, 128, (3, 21), generator=torch.Generator().manual_seed(3))
MASK = torch.arange(21) < torch.tensor([[21], [13], [4]])


def counted(model, per_head: bool = False, ids: Tensor = IDS, mask: Tensor = MASK) -> KVStatistics:
    statistics = KVStatistics(model, per_head)
    with torch.no_grad(), recording(model, statistics, mask):
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    return statistics


@pytest.fixture(params=["stock", "child"])
def model(request, tiny_model, tiny_config):
    if request.param == "stock":
        return tiny_model
    blocks = [{"num_local_experts": n, "sliding_window": w} for n, w in ((8, 8), (3, None), (2, 5), (1, None))]
    torch.manual_seed(0)
    child = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(tiny_config(), blocks)).eval()
    for parameter in child.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return child


ROWS = [IDS[row, :length] for row, length in enumerate((21, 13, 4))]


@pytest.mark.parametrize("attention", ["eager", "sink_attention"])
def test_amax_against_projections_and_rope_by_hand(model, attention):
    expected = keys_and_values(model, ROWS)
    model.set_attn_implementation(attention)
    statistics = counted(model)
    assert statistics.tokens == 38
    for layer, pair in enumerate(expected):
        for kind, x_NGC in enumerate(pair):
            assert len(x_NGC) == 38
            largest_G = x_NGC.abs().amax(dim=(0, 2))
            torch.testing.assert_close(statistics.amax_LSG[layer, kind], largest_G, rtol=1e-4, atol=1e-4)
            assert int(statistics.counts_LSHM[layer, kind].sum()) == x_NGC.numel()


def test_garbage_in_padding_changes_nothing(model):
    garbage = torch.where(MASK, IDS, torch.randint(3, 128, IDS.shape, generator=torch.Generator().manual_seed(9)))
    assert not torch.equal(garbage, IDS)
    clean, dirty = counted(model), counted(model, ids=garbage)
    torch.testing.assert_close(clean.amax_LSG, dirty.amax_LSG, rtol=1e-5, atol=0)  # experts sum in another order
    moved = (clean.counts_LSHM - dirty.counts_LSHM).abs().sum()
    assert moved < 0.002 * clean.counts_LSHM.sum()  # values at the border of two magnitudes
    everything = counted(model, ids=garbage, mask=torch.ones_like(MASK))
    assert everything.tokens == 63
    assert (everything.amax_LSG > 1.02 * clean.amax_LSG).any()


def test_packed_documents_count_as_documents_alone(model):
    """Documents that share a row do not attend to each other, and padding is not counted."""
    documents = torch.full((1, 44), -1)
    documents[0, :38] = torch.tensor([0] * 21 + [1] * 13 + [2] * 4)
    ids = torch.cat([*ROWS, IDS[0, :6]])[None]
    batch = {"input_ids": ids, "position_ids": restarting_positions(documents)}
    model.set_attn_implementation("sink_attention")
    packed = KVStatistics(model, per_head=True)
    with torch.no_grad(), recording(model, packed, documents >= 0):
        model(**model_inputs(model, batch))
    alone = counted(model, per_head=True)
    assert packed.tokens == alone.tokens
    torch.testing.assert_close(packed.amax_LSG, alone.amax_LSG, rtol=1e-4, atol=1e-4)


def test_recording_leaves_the_model_as_it_was(model):
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
        statistics = KVStatistics(model, False)
        with recording(model, statistics, MASK):
            during = model(input_ids=IDS, use_cache=False).logits
        amax = statistics.amax_LSG.clone()
        after = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    assert torch.equal(amax, statistics.amax_LSG)


@pytest.mark.parametrize("per_head", [False, True])
def test_batches_in_any_order_and_a_resumed_state_give_the_same(tiny_model, per_head):
    whole = counted(tiny_model, per_head)
    parts = KVStatistics(tiny_model, per_head)
    for row in (2, 0, 1):
        if row == 1:  # interrupted here, and resumed by another process
            state = {name: tensor.clone() for name, tensor in parts.state_dict().items()}
            parts = KVStatistics(tiny_model, per_head)
            parts.load_state_dict(state)
        with torch.no_grad(), recording(tiny_model, parts, MASK[row : row + 1]):
            tiny_model(input_ids=IDS[row : row + 1], attention_mask=MASK[row : row + 1].long(), use_cache=False)
    assert parts.tokens == whole.tokens
    torch.testing.assert_close(parts.amax_LSG, whole.amax_LSG, rtol=1e-5, atol=0)
    state = whole.state_dict()
    again = KVStatistics(tiny_model, per_head)
    again.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="resume with the same checkpoint and per_head"):
        KVStatistics(tiny_model, not per_head).load_state_dict(state)


def test_memory_follows_the_formula(tiny_model):
    for per_head, sets in ((False, 1), (True, 2)):
        statistics = KVStatistics(tiny_model, per_head)
        held = sum(tensor.nbytes for tensor in statistics.state_dict().values())
        assert held == 8 * 4 * (2 + 65536 * sets) + 8


SETTINGS = [
    ScaleSettings(method, rounding, percent=99.0, per_head=per_head)
    for method in ("amax", "percentile", "mse")
    for rounding in ("power_of_two", "none")
    for per_head in (False, True)
]


class Remembering(KVStatistics):
    """Statistics that keep the counted values."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.seen: dict[tuple[int, int], Tensor] = {}

    def add(self, layer: int, kind: int, x_NGC: Tensor) -> None:
        super().add(layer, kind, x_NGC)
        self.seen[layer, kind] = x_NGC.float()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.method}-{s.rounding}-{s.per_head}")
def test_scales_against_every_value(tiny_model, settings):
    """A bfloat16 model, whose cache is counted exactly: the scales follow from the values themselves."""
    tiny_model.to(torch.bfloat16)
    statistics = Remembering(tiny_model, settings.per_head)
    with torch.no_grad(), recording(tiny_model, statistics, MASK):
        tiny_model(input_ids=IDS, attention_mask=MASK.long(), use_cache=False)
    found = find_scales(statistics, settings, [8, None, 8, None], "print")
    assert (found.method, found.rounding, found.tokens) == (settings.method, settings.rounding, 38)
    assert len(statistics.seen) == 8
    for (layer, kind), x_NGC in statistics.seen.items():
        both = present(found.layers[layer])
        one = (both.k, both.v)[kind]
        assert one.scale.shape == one.amax.shape == ((2,) if settings.per_head else ())
        groups = [x_NGC[:, head] for head in (0, 1)] if settings.per_head else [x_NGC]
        for x, amax, scale in zip(groups, one.amax.reshape(-1), one.scale.reshape(-1), strict=True):
            assert float(amax) == float(x.abs().max())
            assert float(scale) == pytest.approx(_expected(x, settings), rel=1e-6)
        saturated = [(x.abs() > 448 * scale).sum() for x, scale in zip(groups, one.scale.reshape(-1), strict=True)]
        assert one.overflow == sum(int(count) for count in saturated)


def _expected(x: Tensor, settings: ScaleSettings) -> float:
    magnitudes = x.abs().flatten().sort().values
    if settings.method == "mse":
        top = float(magnitudes[-1]) / 448
        tried = [2.0 ** (math.ceil(math.log2(top)) - e) for e in range(13)]
        if settings.rounding == "none":
            tried = [top * 2 ** (-step / 16) for step in range(-16, 193)]
        read = [(x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale for scale in tried]
        errors = [float((x - one).double().pow(2).sum()) for one in read]
        return tried[errors.index(min(errors))]
    index = len(magnitudes) if settings.method == "amax" else -(-len(magnitudes) * 99 // 100)
    scale = float(magnitudes[index - 1]) / 448
    return scale if settings.rounding == "none" else 2.0 ** math.ceil(math.log2(scale))


def test_windowed_layers_can_stay_in_bf16(tiny_model):
    found = find_scales(counted(tiny_model), ScaleSettings(windowed_layers="bf16"), [8, None, 8, None], "print")
    assert [layer is None for layer in found.layers] == [True, False, True, False]
    assert sorted(found.tensors()) == [f"model.layers.{i}.self_attn.{k}_scale" for i in (1, 3) for k in "kv"]


def test_given_scales_are_applied_to_the_counts(tiny_model):
    statistics = counted(tiny_model, per_head=True)
    half = statistics.amax_LSG[1, 0] / 448 / 2
    layers = apply_scales(statistics, [None, (half, torch.full((2,), 100.0)), None, None])
    both = present(layers[1])
    assert layers[0] is None and both.k.headroom == pytest.approx(-1, abs=1e-5)
    assert both.k.overflow > 0 == both.v.overflow


@pytest.mark.parametrize(("value", "shown"), [(0.0, "is 0"), (float("inf"), "inf"), (float("nan"), "nan")])
def test_zero_and_infinite_amax_are_refused_by_layer(tiny_model, value, shown):
    statistics = counted(tiny_model)
    statistics.amax_LSG[2, 1] = value
    with pytest.raises(ValueError, match=r"amax of V in layer 2 is .*no scale follows[\s\S]*v_proj"):
        find_scales(statistics, ScaleSettings(), [None] * 4, "print")
    if value:
        with pytest.raises(ValueError, match="Values of layer 2 are not finite after batch 7"):
            statistics.check_finite("batch 7")
    only_full = find_scales(statistics, ScaleSettings(windowed_layers="bf16"), [8, None, 8, None], "print")
    assert only_full.layers[2] is None  # a layer without scales is not checked


def test_a_dead_head_is_refused_only_where_it_needs_a_scale(tiny_model):
    statistics = counted(tiny_model, per_head=True)
    statistics.amax_LSG[0, 0, 1] = 0
    with pytest.raises(ValueError, match="amax of K in layer 0"):
        find_scales(statistics, ScaleSettings(per_head=True), [None] * 4, "print")
    whole = counted(tiny_model)
    whole.amax_LSG[0, 0, 1] = 0
    assert find_scales(whole, ScaleSettings(), [None] * 4, "print").layers[0] is not None


def test_empty_data_and_wrong_percentages_are_refused(tiny_model):
    with pytest.raises(ValueError, match="No token was counted"):
        find_scales(KVStatistics(tiny_model, False), ScaleSettings(), [None] * 4, "print")
    for percent in (0.0, 100.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 100"):
            ScaleSettings(percent=percent)
