"""The transformers engine against transformers' own `generate`, and what its draws depend on."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.by_generate import by_generate
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, GptOssForCausalLM, PreTrainedModel

from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import EFFORTS, draw
from lit_puzzle.generation.engine import Completion
from lit_puzzle.generation.kv_rows import CompactCache
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.kv_cache.fp8_cache import Fp8Cache
from lit_puzzle.kv_cache.scales import ScalePair
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains, Counting, Sorting

PARENT = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_parent"
BLOCKS = [{"num_local_experts": n, "sliding_window": w} for n, w in ((8, 8), (3, None), (2, 5), (4, None))]
ENDS = [2, *range(5, 128, 10)]  # every tenth token, so that some completions end and others reach the cap
GREEDY = Sampling(max_new_tokens=30, temperature=0.0)
ROUNDED = 0.0005  # seconds are kept to the millisecond


@pytest.fixture
def child(tiny_config) -> PreTrainedModel:
    """Four layers with random weights: windows 8 and 5, two of full attention; experts differ."""
    torch.manual_seed(0)
    model = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(tiny_config(), BLOCKS)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    model.generation_config.eos_token_id = ENDS
    return model


@pytest.fixture
def tokenizer():
    built = build_tokenizer()
    built.eos_token = built.convert_ids_to_tokens(2)
    return built


def random_prompts(count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def parent():
    model, tokenizer = load_policy(PARENT, "float32")
    asked = draw([Chains(), Sorting(), Counting()], dict.fromkeys(EFFORTS, 1.0), 300, seed=4, held_out=False)
    texts = [render_prompt(tokenizer, *pair) for pair in asked]
    prompts = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return model.eval(), tokenizer, prompts


@pytest.fixture(scope="module")
def greedy(parent) -> list[Completion]:
    model, _, prompts = parent
    order = sorted(range(300), key=lambda place: len(prompts[place]))
    parts = [by_generate(model, [prompts[i] for i in order[start : start + 75]], 24) for start in range(0, 300, 75)]
    found = dict(zip(order, (completion for part in parts for completion in part), strict=True))
    return [found[place] for place in range(300)]


@pytest.mark.parametrize("batch_size", [7, 128])
@pytest.mark.slow
def test_greedy_tokens_of_the_tiny_parent_are_those_of_generate(parent, greedy, batch_size):
    model, tokenizer, prompts = parent
    assert TransformersEngine(model, tokenizer, batch_size).generate(prompts, Sampling(24, 0.0)) == greedy
    assert {completion.finish for completion in greedy} == {"stop", "length"}
    assert min(len(prompt) for prompt in prompts) > 2 * model.config.sliding_window


def some_scales() -> list[ScalePair | None]:
    per_head = torch.tensor([2.0**-6, 2.0**-4])
    return [(torch.tensor(2.0**-5), torch.tensor(0.004)), (per_head, per_head / 8), None, (torch.tensor(1.0),) * 2]


@pytest.mark.parametrize(("attention", "fp8"), [("eager", False), ("eager", True), ("sink_attention", False)])
def test_greedy_tokens_of_a_child_with_several_windows(child, tokenizer, monkeypatch, attention: str, fp8: bool):
    monkeypatch.setattr("lit_puzzle.generation.decoding.CLASS_TOKENS", 16)  # rows change batches while they grow
    child.set_attn_implementation(attention)
    make_cache = partial(Fp8Cache, child.config, some_scales()) if fp8 else None
    prompts = random_prompts(24, 40)
    alone = [by_generate(child, [prompt], 30, make_cache)[0] for prompt in prompts]
    for batch_size in (1, 5, 64):
        assert TransformersEngine(child, tokenizer, batch_size, make_cache).generate(prompts, GREEDY) == alone
    if fp8:
        assert alone != [by_generate(child, [prompt], 30)[0] for prompt in prompts]
    else:
        assert {completion.finish for completion in alone} == {"stop", "length"}


class Watch:
    """Notes the shape of every forward pass of a model, and how many real tokens it reads."""

    def __init__(self, model: nn.Module) -> None:
        self.passes: list[tuple[int, int, int]] = []  # rows, new tokens, columns of the mask
        self.real: list[int] = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, arguments: object, given: dict[str, Tensor]) -> None:
        rows, new = given["input_ids"].shape
        self.passes.append((rows, new, given["attention_mask"].shape[1]))
        self.real.append(int(given["attention_mask"][:, -new:].sum()))


def test_nothing_is_read_twice_and_rows_stay_within_the_batch(child, tokenizer, monkeypatch):
    monkeypatch.setattr("lit_puzzle.generation.decoding.CLASS_TOKENS", 16)
    prompts, watch = random_prompts(60, 40), Watch(child)
    completions = TransformersEngine(child, tokenizer, 6).generate(prompts, GREEDY)
    reading = [real for (_, new, _), real in zip(watch.passes, watch.real, strict=True) if new > 1]
    assert sum(reading) >= sum(len(prompt) for prompt in prompts if len(prompt) > 1)
    read = sum(len(prompt) for prompt in prompts) + sum(len(done.token_ids) - 1 for done in completions)
    assert read <= sum(watch.real) <= 1.15 * read  # the rest: rows that ended and wait until others leave with them
    assert max(rows for rows, _, _ in watch.passes) <= 6


def test_an_endless_completion_does_not_widen_the_others(child, tokenizer, monkeypatch):
    monkeypatch.setattr("lit_puzzle.generation.decoding.CLASS_TOKENS", 16)
    prompts, watch = [[token] for token in range(3, 127)], Watch(child)
    completions = TransformersEngine(child, tokenizer, 8).generate(prompts, Sampling(150, 0.0))
    lengths = [len(done.token_ids) for done in completions]
    assert sorted(lengths)[len(lengths) // 2] < 16 < 64 < max(lengths)
    assert max(columns for rows, _, columns in watch.passes if rows > 4) <= 32


def test_long_prompts_are_read_in_small_groups(child, tokenizer, monkeypatch):
    monkeypatch.setattr("lit_puzzle.generation.decoding.PREFILL_PAIRS", 3 * 20 * 20)
    prompts, watch = [[5] * 20] * 7 + [[6] * 100], Watch(child)
    TransformersEngine(child, tokenizer, 64).generate(prompts, Sampling(2))
    assert [shape[:2] for shape in watch.passes if shape[1] > 1] == [(3, 20), (3, 20), (1, 20), (1, 100)]


@pytest.mark.parametrize("sampling", [Sampling(24, 1.0, seed=1), Sampling(24, 0.7, 0.9, seed=2)])
@pytest.mark.slow
def test_samples_depend_on_neither_batch_nor_order_nor_shard(parent, sampling):
    model, tokenizer, prompts = parent
    prompts, rows = prompts[:60], range(1000, 1060)
    large, small = TransformersEngine(model, tokenizer, 128), TransformersEngine(model, tokenizer, 7)
    whole = large.generate(prompts, sampling, rows)
    assert small.generate(prompts[::-1], sampling, rows[::-1]) == whole[::-1]
    shards = [large.generate(prompts[rank::3], sampling, rows[rank::3]) for rank in range(3)]
    assert [shards[place % 3][place // 3] for place in range(60)] == whole
    other_rows = large.generate(prompts, sampling)
    other_seed = large.generate(prompts, replace(sampling, seed=9), rows)
    for changed in (other_rows, other_seed):
        assert sum(a != b for a, b in zip(whole, changed, strict=True)) >= 15


def test_samples_follow_the_models_softmax(child, tokenizer):
    engine = TransformersEngine(child, tokenizer, 500)
    drawn = [done.token_ids[0] for done in engine.generate([[9, 10, 11]] * 4000, Sampling(1, 0.7))]
    with torch.no_grad():
        p = (child(torch.tensor([[9, 10, 11]])).logits[0, -1].double() / 0.7).softmax(-1)
    likely = p > 5 / 4000
    counts = torch.bincount(torch.tensor(drawn), minlength=128)[likely]
    statistic = float(((counts - 4000 * p[likely]) ** 2 / (4000 * p[likely])).sum())
    degrees = int(likely.sum())
    assert degrees > 5 and statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_logprobs_are_those_of_the_untempered_softmax(child, tokenizer, monkeypatch):
    monkeypatch.setattr("lit_puzzle.generation.decoding.CLASS_TOKENS", 16)  # caches are cut and joined
    prompts = random_prompts(24, 40)
    completions = TransformersEngine(child, tokenizer, 4).generate(prompts, Sampling(12, 0.6, 0.9, logprobs=True))
    for prompt, done in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits_TV = child(torch.tensor([prompt + done.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits_TV.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, rtol=0, atol=1e-4)


def test_the_last_rows_and_the_whole_context_can_be_used(child, tokenizer):
    engine, context = TransformersEngine(child, tokenizer, 4), 40
    child.config.max_position_embeddings = context
    rows = [2**64 - 1, 2**64 - 2]
    one, other = engine.generate([[5] * (context - 3)] * 2, Sampling(3, 1.0, seed=2**64 - 1), rows)
    assert 1 <= len(one.token_ids) <= 3 and one.token_ids != other.token_ids


def test_seconds_of_a_completion_end_with_its_last_token(child, tokenizer):
    prompts = random_prompts(40, 30)
    begun = time.monotonic()
    completions = TransformersEngine(child, tokenizer, 8).generate(prompts, GREEDY)
    seconds, until = [completion.seconds or 0.0 for completion in completions], time.monotonic() - begun
    assert all(0 < each <= until + ROUNDED for each in seconds) and len(set(seconds)) > 8
    assert replace(completions[0], seconds=None) == completions[0]


def test_end_tokens_stay_and_the_cap_counts_them(child, tokenizer):
    prompts = random_prompts(40, 20)
    engine = TransformersEngine(child, tokenizer, 16)
    for done in engine.generate(prompts, Sampling(6, seed=3)):
        assert not set(done.token_ids[:-1]) & set(ENDS) and done.logprobs is None
        assert (done.token_ids[-1] in ENDS) == (done.finish == "stop")
        assert len(done.token_ids) == 6 or done.finish == "stop"
    assert {len(done.token_ids) for done in engine.generate(prompts, Sampling(1))} == {1}
    assert engine.generate([], Sampling()) == []


def test_modes_random_state_and_sampling_settings_of_the_checkpoint(child, tokenizer):
    engine, prompts = TransformersEngine(child, tokenizer, 4), random_prompts(9, 20)
    plain = engine.generate(prompts, GREEDY)
    child.train()
    child.model.layers[1].eval()
    child.model.layers[0].self_attn.attention_dropout = 0.5  # would be felt in training mode
    modes, state = [module.training for module in child.modules()], torch.get_rng_state()
    child.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1)
    assert engine.generate(prompts, GREEDY) == plain
    engine.generate(prompts, Sampling(3))
    assert [module.training for module in child.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


class Stored:
    """Makes caches and keeps them, to look at what they hold."""

    def __init__(self, make_cache: Callable[[], DynamicCache]) -> None:
        self.make_cache = make_cache
        self.caches: list[DynamicCache] = []

    def __call__(self) -> DynamicCache:
        self.caches.append(self.make_cache())
        return self.caches[-1]

    def dtypes(self) -> set[torch.dtype]:
        layers = [layer for cache in self.caches for layer in cache.layers if layer.is_initialized]
        return {x.dtype for layer in layers for x in (layer.keys, layer.values) if isinstance(x, Tensor)}


@pytest.mark.parametrize("attention", ["eager", "sink_attention"])
@pytest.mark.slow
def test_keys_are_stored_in_the_dtype_of_the_weights(child, tokenizer, attention):
    """Float32 embeddings under autocast, as in bf16-mixed training, make float32 keys of bfloat16 projections."""
    child.set_attn_implementation(attention)
    child.bfloat16()
    child.model.embed_tokens.float()
    prompts = random_prompts(20, 30)
    plain, compact = (Stored(partial(kind, config=child.config)) for kind in (DynamicCache, CompactCache))
    with torch.autocast("cpu", torch.bfloat16):
        expected = TransformersEngine(child, tokenizer, 4, plain).generate(prompts, GREEDY)
        assert TransformersEngine(child, tokenizer, 4, compact).generate(prompts, GREEDY) == expected
    assert plain.dtypes() == {torch.float32}  # transformers stores values in the dtype of the keys
    assert compact.dtypes() == {torch.bfloat16}
    assert type(TransformersEngine(child, tokenizer, 4).make_cache()) is CompactCache


@pytest.mark.parametrize("batch_size", [2, 6])
def test_the_cache_takes_the_bytes_that_the_docstring_states(tiny_model: GptOssForCausalLM, tokenizer, batch_size):
    config, prompt, new = tiny_model.config, 20, 5
    tiny_model.generation_config.eos_token_id = tokenizer.eos_token_id
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    tokens = sum(min(window or prompt + new, prompt + new) for window in windows)
    stated = batch_size * 2 * config.num_key_value_heads * config.head_dim * 4 * tokens
    stored = Stored(partial(CompactCache, config=config))
    completions = TransformersEngine(tiny_model, tokenizer, 6, stored).generate(
        [[9] * prompt] * batch_size, Sampling(5)
    )
    assert {len(done.token_ids) for done in completions} == {5}
    used = [sum(x.nbytes for layer in cache.layers if layer.is_initialized for x in (layer.keys, layer.values))
            for cache in stored.caches]  # fmt: skip
    assert 0.9 * stated < max(used) <= stated


def test_wrong_input_is_refused(child, tokenizer):
    engine = TransformersEngine(child, tokenizer, 4)
    with pytest.raises(ValueError, match="3 rows were given for 2 prompts"):
        engine.generate([[5], [6]], GREEDY, [0, 1, 2])
    with pytest.raises(ValueError, match=r"from 0 to 2\^64 - 1; those given are from -1 to 0"):
        engine.generate([[5], [6]], GREEDY, [0, -1])
    with pytest.raises(ValueError, match=r"those given are from 0 to 18446744073709551616"):
        engine.generate([[5], [6]], GREEDY, [0, 2**64])
    context = child.config.max_position_embeddings
    with pytest.raises(
        ValueError, match=rf"Prompt 1 has 9 tokens; with max_new_tokens {context - 8} it exceeds the con"
    ):
        engine.generate([[5], [6] * 9], Sampling(context - 8, 0.0))
    with pytest.raises(ValueError, match="batch_size 0 was given; 1 or more is needed"):
        TransformersEngine(child, tokenizer, 0)
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        engine.generate([[5], []], GREEDY)
    child.lm_head.weight.data[7] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits are not finite"):
            engine.generate([[5], [6]], Sampling(4, temperature))
    child.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names no end token"):
        TransformersEngine(child, tokenizer, 4)
    bare = AutoTokenizer.from_pretrained(PARENT)
    bare.pad_token = None
    with pytest.raises(ValueError, match="names no padding token"):
        TransformersEngine(child, bare, 4)


def test_caches_of_other_kinds_are_refused(tiny_model: GptOssForCausalLM, tokenizer):
    quantized = partial(DynamicCache, config=tiny_model.config)

    def other() -> DynamicCache:
        cache = quantized()
        cache.layers[0] = type("RecurrentLayer", (type(cache.layers[0]),), {})(sliding_window=8)
        return cache

    with pytest.raises(ValueError, match=r"layers \['RecurrentLayer'\]; the transformers engine knows full attention"):
        TransformersEngine(tiny_model, tokenizer, 4, other)
