"""The simulated FP8 cache against a plain reimplementation, in generation and over whole sequences."""

import math
from collections.abc import Sequence

import pytest
import torch
from helpers.by_generate import by_generate
from helpers.present import present
from helpers.recovery_runs import Fingerprint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.evaluate.accuracy import evaluate, read_episodes
from lit_puzzle.evaluate.held_out import HeldOut
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.kv_cache.fp8_cache import Fp8Cache, layer_scales, scales_for
from lit_puzzle.kv_cache.quality_loss import add_outliers, kv_quality_loss
from lit_puzzle.kv_cache.scales import KVScales, LayerScales, ScalePair, TensorScale
from lit_puzzle.kv_cache.settings import ScaleSettings
from lit_puzzle.kv_cache.statistics import KVStatistics, find_scales, recording
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.tiny.tokenizer import build_tokenizer

BLOCKS = [{"num_local_experts": n, "sliding_window": w} for n, w in ((8, 8), (3, None), (2, 5), (4, None))]
IDS = torch.randint(3, 128, (3, 21), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(21) < torch.tensor([[21], [13], [4]])).long()


@pytest.fixture
def child(tiny_config, tiny_model) -> PreTrainedModel:
    """Four layers: windows 8 and 5, two of full attention; experts differ. The weights have no zeros."""
    torch.manual_seed(0)
    model = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(tiny_config(), BLOCKS)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model


def some_scales(count: int = 4) -> list[ScalePair | None]:
    per_head = torch.tensor([2.0**-6, 2.0**-4])
    found = [(torch.tensor(2.0**-5), torch.tensor(0.004)), (per_head, per_head / 8), None, (torch.tensor(1.0),) * 2]
    return found[:count]


class PlainFp8(torch.nn.Module):
    """Attention over a whole sequence with keys and values rounded to FP8, written without any cache."""

    def __init__(self, attention: GptOssAttention, scales: ScalePair | None, window: int | None) -> None:
        super().__init__()
        self.attention, self.scales, self.window = attention, scales, window

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_) -> tuple[Tensor, None]:
        a, (B, T) = self.attention, hidden_states.shape[:2]
        q, k, v = (p(hidden_states).view(B, T, -1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = (turned(x, *position_embeddings) for x in (q, k))
        if self.scales is not None:
            k, v = (rounded(x, scale) for x, scale in zip((k, v), self.scales, strict=True))
        out = torch.zeros_like(q)
        for t in range(T):
            first = 0 if self.window is None else max(0, t - self.window + 1)
            for h in range(q.shape[2]):
                g = h * k.shape[2] // q.shape[2]
                products = (k[:, first : t + 1, g] @ q[:, t, h, :, None])[..., 0] / math.sqrt(a.head_dim)
                sink = a.sinks[h].expand(B, 1)
                weights = torch.cat([products, sink], 1).softmax(1)[:, :-1]
                out[:, t, h] = (weights[..., None] * v[:, first : t + 1, g]).sum(1)
        return a.o_proj(out.reshape(B, T, -1)), None


def turned(x_BTHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by complex numbers: channel c is the real part, c + half a head the imaginary one."""
    real, imaginary = x_BTHC.chunk(2, dim=-1)
    product = torch.complex(real, imaginary) * torch.complex(cos, sin)[:, :, None]
    return torch.cat([product.real, product.imag], -1)


def rounded(x_BTGC: Tensor, scale: Tensor) -> Tensor:
    scale = scale if scale.ndim == 0 else scale[:, None]
    return (x_BTGC / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def plain_logits(model: PreTrainedModel, ids_BT: Tensor, scales: Sequence[ScalePair | None]) -> Tensor:
    """A whole forward pass of a copy of the model whose attention is `PlainFp8`."""
    windows = [block["sliding_window"] for block in model.config.block_configs]
    originals = [layer.self_attn for layer in model.model.layers]
    for layer, pair, window in zip(model.model.layers, scales, windows, strict=True):
        layer.self_attn = PlainFp8(layer.self_attn, pair, window)
    with torch.no_grad():
        logits = model(input_ids=ids_BT, use_cache=False).logits
    for layer, attention in zip(model.model.layers, originals, strict=True):
        layer.self_attn = attention
    return logits


@pytest.mark.parametrize("attention", ["eager", "sink_attention"])
def test_whole_sequences_equal_the_plain_reimplementation(child, attention):
    child.set_attn_implementation(attention)
    cache = Fp8Cache(child.config, some_scales())
    with torch.no_grad():
        logits = child(input_ids=IDS, past_key_values=cache, use_cache=True).logits
        exact = child(input_ids=IDS, use_cache=False).logits
    expected = plain_logits(child, IDS, some_scales())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (exact - expected).abs().max() > 0.05  # FP8 makes a difference


def test_generation_equals_the_plain_reimplementation(child):
    """Token by token; the plain reimplementation reads the whole sequence again for each token."""
    tokenizer = build_tokenizer()
    child.generation_config.eos_token_id = tokenizer.eos_token_id
    prompts = [IDS[0, :9].tolist(), IDS[1, :5].tolist()]
    scales = some_scales()
    greedy = Sampling(14, temperature=0.0)
    engine = TransformersEngine(child, tokenizer, 2, lambda: Fp8Cache(child.config, scales))
    completions = engine.generate(prompts, greedy)
    for prompt, done in zip(prompts, completions, strict=True):
        sequence = list(prompt)
        for token in done.token_ids:
            assert int(plain_logits(child, torch.tensor([sequence]), scales)[0, -1].argmax()) == token
            sequence.append(token)
    assert completions != TransformersEngine(child, tokenizer, 2).generate(prompts, greedy)


def test_the_cache_stores_fp8_and_no_more_than_the_window(child):
    cache = Fp8Cache(child.config, some_scales())
    child.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache)
    plain = DynamicCache(config=child.config)
    child.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=plain)
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in plain.layers]
    fp8 = torch.float8_e4m3fn
    assert [layer.keys.dtype for layer in cache.layers] == [fp8, fp8, torch.float32, fp8]
    assert [layer.values.shape[-2] for layer in cache.layers] == [7, 24, 4, 24]


def test_a_stock_model_accepts_the_cache(tiny_model):
    cache = Fp8Cache(tiny_model.config, some_scales())
    with torch.no_grad():
        whole = tiny_model(input_ids=IDS, past_key_values=cache, use_cache=True).logits
        cache = Fp8Cache(tiny_model.config, some_scales())
        parts = [
            tiny_model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(21)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def calibrated(model: PreTrainedModel, settings: ScaleSettings) -> list[ScalePair | None]:
    statistics = KVStatistics(model, settings.per_head)
    with torch.no_grad(), recording(model, statistics, MASK.bool()):
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    found = find_scales(statistics, settings, [None] * 4, "")
    return [None if layer is None else (layer.k.scale, layer.v.scale) for layer in found.layers]


@pytest.mark.parametrize("heads", [None, [1]])
def test_outliers_change_only_the_cache(child, heads):
    exact = ScaleSettings(rounding="none", per_head=True)
    usual = calibrated(child, exact)
    with torch.no_grad():
        before = child(input_ids=IDS, use_cache=False).logits
        add_outliers(child, 512.0, [0, 1, 2, 3], heads)
        after = child(input_ids=IDS, use_cache=False).logits
    assert torch.equal(before, after)
    factors = torch.tensor([512.0, 512.0] if heads is None else [1.0, 512.0])
    for pair, other in zip(calibrated(child, exact), usual, strict=True):
        torch.testing.assert_close(pair, tuple(scale * factors for scale in present(other)))


@pytest.mark.parametrize("factor", [2.0**10, 2.0**-13])
def test_calibration_restores_a_model_with_outliers(child, factor):
    """Values too large or too small for FP8: scale 1 ruins the predictions, calibrated scales hardly change them."""
    channels = [0, 2] if factor > 1 else [0, 1, 2, 3]
    batches = [{"input_ids": IDS, "attention_mask": MASK}]
    ones = [(torch.tensor(1.0),) * 2] * 4
    usual = kv_quality_loss(child, batches, calibrated(child, ScaleSettings()))
    add_outliers(child, factor, channels)
    without = kv_quality_loss(child, batches, ones)
    for settings in (ScaleSettings(), ScaleSettings("mse"), ScaleSettings(per_head=True)):
        assert kv_quality_loss(child, batches, calibrated(child, settings))["kl"] < 0.1 * without["kl"]
    assert without["kl"] > 10 * usual["kl"] > 0
    assert without["top1"] > 0.5
    kept = kv_quality_loss(child, batches, [None] * 4)
    assert kept["kl"] == pytest.approx(0, abs=1e-9) and kept["top1"] == 0


def test_quality_loss_against_a_loop_over_tokens(child):
    scales = some_scales()
    quality_loss = kv_quality_loss(child, [{"input_ids": IDS, "attention_mask": MASK}], scales)
    kl, gain = [], []
    for row, length in enumerate((21, 13, 4)):
        with torch.no_grad():
            p = child(input_ids=IDS[row : row + 1, :length], use_cache=False).logits[0].double().softmax(-1)
        q = plain_logits(child, IDS[row : row + 1, :length], scales)[0].double().softmax(-1)
        for t in range(length - 1):
            kl.append(float((p[t] * (p[t] / q[t]).log()).sum()))
            gain.append(float((q[t] / p[t])[IDS[row, t + 1]].log()))
    assert quality_loss["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert quality_loss["log_prob"] == pytest.approx(sum(gain) / len(gain), rel=1e-3)


def test_source_of_the_scales(child, tmp_path):
    """A folder of this checkpoint's scales; else those in the checkpoint (layer 2 is windowed); else 1."""
    child.save_pretrained(tmp_path / "model")
    assert scales_for(tmp_path / "model", None) == [(torch.tensor(1.0),) * 2] * 4
    one = TensorScale(torch.tensor(10.0), torch.tensor(0.5), 0)
    two = TensorScale(torch.tensor([10.0, 20.0]), torch.tensor([0.5, 1.0]), 0)
    layers = (LayerScales(one, two), LayerScales(one, one), None, LayerScales(one, one))
    scales = KVScales(fingerprint(tmp_path / "model"), "gpt_oss_puzzle", "amax", "none", 1, layers)
    scales.save(tmp_path / "scales")
    found = scales_for(tmp_path / "model", tmp_path / "scales")
    k_scale, v_scale = present(found[0])
    assert found[2] is None and float(k_scale) == 0.5 and v_scale.tolist() == [0.5, 1.0]
    KVScales("another", "gpt_oss_puzzle", "amax", "none", 1, layers).save(tmp_path / "other")
    with pytest.raises(ValueError, match="The KV scales are of checkpoint another"):
        scales_for(tmp_path / "model", tmp_path / "other")
    with pytest.raises(ValueError, match="without an FP8 cache"):
        evaluate(tmp_path, tmp_path / "model", HeldOut([Fingerprint()], ["low"], 2), kv_scales=tmp_path / "scales")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors |= {name: scale.clone() for name, scale in scales.tensors().items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    stored = scales_for(tmp_path / "model", None)
    assert present(stored[0])[1].tolist() == [0.5, 1.0] and stored[2] is None and float(present(stored[3])[0]) == 0.5
    name = "model.layers.3.self_attn.k_scale"
    for changed, message in (
        ({key: tensor for key, tensor in tensors.items() if ".3.self_attn.k_sc" not in key}, f"{name} is missing"),
        ({key: t for key, t in tensors.items() if "_scale" not in key or ".3." not in key}, f"but no {name}"),
        (tensors | {name: torch.tensor(0.0)}, rf"{name} is 0\.0; it must be positive and finite"),
    ):
        save_file(changed, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            scales_for(tmp_path / "model", None)


@pytest.mark.slow
def test_evaluation_under_an_fp8_cache(child, tmp_path):
    """Completions are those under the FP8 cache, batch after batch, and not those of the model's own cache."""
    tokenizer, environment = build_tokenizer(), Fingerprint()
    child.generation_config.eos_token_id = tokenizer.eos_token_id
    child.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    coarse = TensorScale(torch.tensor(10.0), torch.tensor(2.0), 0)
    scales = KVScales(
        fingerprint(tmp_path / "model"), "gpt_oss_puzzle", "amax", "none", 1, (LayerScales(coarse, coarse),) * 4
    )
    scales.save(tmp_path / "scales")
    settings = {"kv_cache": "fp8", "kv_scales": tmp_path / "scales"}
    held_out = HeldOut([environment], ["low"], 5, answer_format="whole")
    small = Sampling(40, temperature=0.0), EngineSettings(batch_size=3)
    results = evaluate(tmp_path, tmp_path / "model", held_out, *small, **settings)
    problems = held_out.problems()
    values: dict[str, list[float]] = {"model": [], "fp8": []}
    for name, make_cache in (("model", None), ("fp8", lambda: Fp8Cache(child.config, layer_scales(scales)))):
        for problem, effort in problems:
            prompt = tokenizer(render_prompt(tokenizer, problem, effort), add_special_tokens=False)["input_ids"]
            (done,) = by_generate(child, [prompt], 40, make_cache)
            values[name].append(environment.verify(tokenizer.decode(done.token_ids), problem.answer))
    assert [episode.correct for episode in read_episodes(tmp_path)] == values["fp8"] != values["model"]
    assert results["accuracy/low"] == pytest.approx(sum(values["fp8"]) / 5)
