"""The heterogeneous gpt-oss against the stock one, which is the oracle wherever the two overlap."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

import lit_puzzle.model.gpt_oss as source
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM, balancing_loss

Blocks = list[dict[str, int | None]]
Mix = Sequence[tuple[int, int | None]]  # experts and window of each layer
STOCK: list[tuple[int, int | None]] = [(8, 8), (8, None), (8, 8), (8, None)]
MIXES: dict[str, Mix] = {
    "stock": STOCK,
    "all full": [(8, None)] * 4,
    "all windows": [(8, 4), (8, 8), (8, 4), (8, 16)],
    "wide, full, narrow": [(8, 8), (4, 20), (8, 2), (3, None)],
    "one expert, windows first and last": [(1, None), (5, None), (8, 64), (2, 8)],
}


def blocks_of(mix: Mix) -> Blocks:
    return [{"num_local_experts": experts, "sliding_window": window} for experts, window in mix]


def pruned(parent: GptOssForCausalLM, mix: Mix) -> GptOssPuzzleForCausalLM:
    """A child that keeps the first experts of each layer: the rows of four expert tensors and two router tensors."""
    child = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(parent.config, blocks_of(mix)))
    shapes = {name: value.shape for name, value in child.state_dict().items()}
    child.load_state_dict({name: value[: shapes[name][0]] for name, value in parent.state_dict().items()})
    return child.eval()


def prompts(rows: int = 3, tokens: int = 30) -> Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=MIXES)
def mixed(request: pytest.FixtureRequest, tiny_model: GptOssForCausalLM) -> GptOssPuzzleForCausalLM:
    return pruned(tiny_model, MIXES[request.param])


class TestConfig:
    def test_works_without_arguments_and_is_then_the_stock_120b(self) -> None:
        config = GptOssPuzzleConfig()
        assert config.block_configs[:2] == blocks_of([(128, 128), (128, None)])
        assert config.layer_types == GptOssConfig().layer_types

    def test_blocks_are_all_that_is_written_and_everything_comes_back(self, tmp_path: Path, tiny_config: Any) -> None:
        blocks = blocks_of(MIXES["wide, full, narrow"])
        config = GptOssPuzzleConfig.from_parent(tiny_config(), blocks)
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["block_configs"] == blocks
        assert written["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]
        assert not {"per_layer_config", "allow_global_per_layer_attribute_access"} & set(written)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is GptOssPuzzleConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        layers: Any = loaded.per_layer_config
        assert [layer.sliding_window for layer in layers] == [8, 20, 2, None]
        assert [layer.num_local_experts for layer in layers] == [8, 4, 8, 3]

    def test_layer_types_are_written_even_where_they_are_the_default(self, tmp_path: Path) -> None:
        GptOssPuzzleConfig().save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert len(written["layer_types"]) == len(written["block_configs"]) == 36

    def test_a_child_can_be_pruned_further(self, tiny_config: Any) -> None:
        child = GptOssPuzzleConfig.from_parent(tiny_config(), blocks_of(STOCK))
        grandchild = GptOssPuzzleConfig.from_parent(child, blocks_of(MIXES["all windows"]))
        assert grandchild.block_configs == blocks_of(MIXES["all windows"])
        assert grandchild.vocab_size == 128

    def test_per_layer_config_alone_is_understood(self, tiny_config: Any) -> None:
        sparse = {"01": {"num_local_experts": 3}, "02": {"sliding_window": 5}}
        settings = tiny_config().to_dict() | {"layer_types": None, "per_layer_config": sparse}
        settings.pop("model_type")
        assert GptOssPuzzleConfig(**settings).block_configs == blocks_of([(8, 8), (3, None), (8, 5), (8, None)])
        agreeing = blocks_of([(8, 8), (3, None), (8, 5), (8, None)])
        assert GptOssPuzzleConfig(**settings, block_configs=agreeing).block_configs == agreeing

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"block_configs": blocks_of(STOCK[:3])}, "3 entries and num_hidden_layers is 4"),
            ({"block_configs": blocks_of([*STOCK[:2], (0, 8), (8, 8)])}, r"\[2\] has num_local_experts=0"),
            ({"block_configs": blocks_of([*STOCK[:3], (8, -8)])}, r"\[3\] has sliding_window=-8"),
            ({"block_configs": blocks_of([*STOCK[:3], (8, 1)])}, r"\[3\] has sliding_window=1"),
            ({"block_configs": [*blocks_of(STOCK[:3]), {"num_local_experts": 8}]}, r"\[3\] has the keys"),
            (
                {"block_configs": blocks_of(STOCK), "per_layer_config": {"1": {"num_local_experts": 4}}},
                "per_layer_config",
            ),
            ({"block_configs": blocks_of(STOCK), "per_layer_config": {"1": {"head_dim": 4}}}, "per_layer_config"),
            ({"block_configs": blocks_of(STOCK), "layer_types": ["full_attention"] * 4}, "layer_types"),
        ],
    )
    def test_what_contradicts_or_is_malformed_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GptOssPuzzleConfig(num_hidden_layers=4, num_local_experts=8, sliding_window=8, **settings)

    def test_the_configuration_of_one_layer_is_a_stock_one(self, tiny_config: Any) -> None:
        config = GptOssPuzzleConfig.from_parent(tiny_config(), blocks_of(MIXES["one expert, windows first and last"]))
        layer = config.get_gpt_oss_config_for_layer(0)
        assert type(layer) is GptOssConfig
        assert (layer.num_local_experts, layer.sliding_window, layer.num_experts_per_tok) == (1, None, 1)
        unlike = {"num_local_experts", "sliding_window", "num_experts_per_tok", "architectures", "layer_types"}
        for name in {field.name for field in fields(GptOssConfig)} - unlike:
            assert getattr(layer, name) == getattr(config, name), name

    @pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
    def test_yarn_of_the_released_model_loads(self, form: str) -> None:
        yarn = {"rope_type": "yarn", "factor": 56.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        yarn["original_max_position_embeddings"] = 4096
        settings = (
            {form: yarn | {"rope_theta": 150000.0}}
            if form == "rope_parameters"
            else {form: yarn, "rope_theta": 150000.0}
        )
        config = GptOssPuzzleConfig(max_position_embeddings=229376, **settings)
        assert config.rope_parameters == yarn | {"rope_theta": 150000.0}
        config.validate()


class TestAgainstStock:
    @pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
    def test_identity_blocks_are_the_stock_model_bit_for_bit(self, tiny_model: GptOssForCausalLM, experts: str) -> None:
        child = pruned(tiny_model, STOCK)
        ids = prompts()
        mask = torch.ones_like(ids)
        mask[0, :11] = 0
        results = []
        for model in (tiny_model, child):
            model.set_experts_implementation(experts)
            assert model.config._experts_implementation == experts
            output = model(ids, attention_mask=mask, labels=ids)
            output.loss.backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            tokens = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
            results.append((output.logits, output.loss, gradients, tokens))
        (logits, loss, gradients, tokens), (child_logits, child_loss, child_gradients, child_tokens) = results
        assert torch.equal(logits, child_logits)
        assert torch.equal(loss, child_loss)
        assert torch.equal(tokens, child_tokens)
        assert tokens.shape == (3, 42)
        assert gradients.keys() == child_gradients.keys()
        assert all(torch.equal(gradients[name], child_gradients[name]) for name in gradients)
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())

    def test_names_shapes_and_dtypes_of_the_weights_are_stock(self, tiny_config: Any) -> None:
        config = tiny_config(dtype="bfloat16")
        stock = GptOssForCausalLM._from_config(config)
        child = GptOssPuzzleForCausalLM._from_config(GptOssPuzzleConfig.from_parent(config, blocks_of(STOCK)))
        described = [{name: (v.shape, v.dtype) for name, v in model.state_dict().items()} for model in (stock, child)]
        assert list(described[0].items()) == list(described[1].items())
        assert described[0]["lm_head.weight"][1] is torch.bfloat16

    @pytest.mark.parametrize("kept", [5, 2, 1])
    def test_fewer_experts_equal_the_stock_model_with_the_others_masked(
        self, tiny_model: GptOssForCausalLM, kept: int
    ) -> None:
        """With as many masks as leave fewer than top-k, the softmax gives those masked a weight of exactly 0."""
        child = pruned(tiny_model, [(8, 8), (kept, None), (8, 8), (kept, None)])
        unmasked = tiny_model(prompts()).logits
        for layer in (1, 3):
            with torch.no_grad():
                tiny_model.model.layers[layer].mlp.router.bias[kept:] = -torch.inf
        expected = tiny_model(prompts()).logits
        assert (expected - unmasked).abs().max() > 0.01
        torch.testing.assert_close(child(prompts()).logits, expected, atol=2e-5, rtol=2e-5)

    def test_each_layer_has_its_own_window(self, tiny_model: GptOssForCausalLM) -> None:
        """Two stock layers are as far as a token sees: the window of each layer less one, added up."""
        for mix in ([(8, 3), (8, 5), (8, 2), (8, 4)], [(8, 2), (8, 2), (8, 2), (8, 12)]):
            child = pruned(tiny_model, mix)
            reach = sum(window - 1 for _, window in mix if window)
            embeddings = child.get_input_embeddings()(prompts(1)).detach().requires_grad_()
            child(inputs_embeds=embeddings).logits[0, -1].sum().backward()
            assert embeddings.grad is not None
            felt = embeddings.grad[0].abs().amax(-1).nonzero().flatten()
            assert felt.min() == 29 - reach


class TestGeneration:
    @pytest.mark.parametrize("attention", ["eager", "sink_attention"])
    @pytest.mark.parametrize("tokens", [1, 6, 30])
    def test_cached_equals_uncached_with_left_padding(self, mixed: Any, attention: str, tokens: int) -> None:
        mixed.set_attn_implementation(attention)
        ids = prompts(3, tokens)
        mask = torch.ones_like(ids)
        mask[0, : tokens // 2] = 0
        mask[2, : tokens - 1] = 0
        settings = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
        batch = mixed.generate(ids, attention_mask=mask, output_logits=True, **settings)
        logits_BTV = torch.stack(batch.logits, dim=1)
        for row in range(3):
            whole = batch.sequences[row : row + 1, ids.shape[1] - int(mask[row].sum()) :]
            alone = mixed(whole, use_cache=False).logits[0, -15:-1]
            torch.testing.assert_close(logits_BTV[row], alone, atol=3e-5, rtol=3e-5)

    @pytest.mark.parametrize("attention", ["eager", "sink_attention"])
    def test_a_prompt_in_pieces_equals_the_prompt_at_once(self, mixed: Any, attention: str) -> None:
        mixed.set_attn_implementation(attention)
        ids, cache = prompts(2, 33), DynamicCache(config=mixed.config)
        pieces = [mixed(piece, past_key_values=cache).logits for piece in ids.split([17, 1, 12, 3], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), mixed(ids).logits, atol=3e-5, rtol=3e-5)

    def test_static_cache_and_beams_agree_with_the_default(self, mixed: Any) -> None:
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        default = mixed.generate(prompts(2, 11), **settings)
        static = mixed.generate(prompts(2, 11), cache_implementation="static", disable_compile=True, **settings)
        assert torch.equal(default, static)
        beams = [mixed.generate(prompts(2, 11), num_beams=3, use_cache=cached, **settings) for cached in (True, False)]
        assert torch.equal(*beams)

    def test_the_cache_of_a_layer_is_as_small_as_its_window(self, mixed: Any) -> None:
        cache = mixed(prompts(1, 30), use_cache=True).past_key_values
        windows = [block["sliding_window"] for block in mixed.config.block_configs]
        assert [layer.keys.shape[-2] for layer in cache.layers] == [min(30, (w or 99) - 1) for w in windows]


class TestLoss:
    def test_uniform_balancing_loss_is_stock(self, tiny_model: GptOssForCausalLM) -> None:
        child = pruned(tiny_model, STOCK)
        mask = torch.ones_like(prompts())
        mask[1, 20:] = 0
        for model in (tiny_model, child):
            model.router_aux_loss_coef = 0.3
        expected = tiny_model(prompts(), attention_mask=mask, labels=prompts(), output_router_logits=True)
        output = child(prompts(), attention_mask=mask, labels=prompts(), output_router_logits=True)
        assert torch.equal(output.aux_loss, expected.aux_loss)
        assert torch.equal(output.loss, expected.loss)
        without = child(prompts(), attention_mask=mask, labels=prompts())
        assert without.aux_loss is None
        assert torch.equal(output.loss, without.loss + 0.3 * output.aux_loss)

    def test_mixed_balancing_loss_by_hand(self) -> None:
        """2 tokens, top-1. Layer of 2 experts, both tokens to expert 0 at 3/4: 2 * (1 * 3/4 + 0 * 1/4) = 3/2.

        Layer of 4 experts, tokens to experts 1 and 3 at 1/2, the others at 1/6: means 1/6, 1/3, 1/6, 1/3,
        shares 0, 1/2, 0, 1/2: 4 * (1/6 + 1/6) = 4/3. Layer of 1 expert: 1. Mean: 23/18.
        """
        two = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
        four = torch.tensor([[1.0, 3.0, 1.0, 1.0], [1.0, 1.0, 1.0, 3.0]]).log()
        assert balancing_loss((two, four, torch.zeros(2, 1)), 1).item() == pytest.approx(23 / 18)
        masked = balancing_loss((two, four, torch.zeros(2, 1)), 1, torch.tensor([[1, 0]]))
        assert masked.item() == pytest.approx((3 / 2 + 4 * 1 / 2 + 1) / 3)

    def test_mixed_balancing_loss_reaches_every_router_and_the_language_loss(self, mixed: Any) -> None:
        mixed.router_aux_loss_coef = 0.5
        mixed.config.output_router_logits = True
        output = mixed(prompts(), labels=prompts())
        counts = [block["num_local_experts"] for block in mixed.config.block_configs]
        assert [logits.shape for logits in output.router_logits] == [(90, count) for count in counts]
        if len(set(counts)) > 1:
            each = [
                load_balancing_loss_func((x,), n, min(n, 2)) for x, n in zip(output.router_logits, counts, strict=True)
            ]
            torch.testing.assert_close(output.aux_loss, sum(each) / 4)
        output.aux_loss.backward()
        gradients = [layer.mlp.router.weight.grad.abs().max() > 0 for layer in mixed.model.layers]
        assert gradients == [count > 1 for count in counts]


class TestTraining:
    def test_expert_implementations_agree(self, mixed: Any) -> None:
        logits = {}
        for name in ("eager", "grouped_mm", "batched_mm"):
            mixed.set_experts_implementation(name)
            assert mixed.model.layers[1].mlp.experts.config._experts_implementation == name
            logits[name] = mixed(prompts()).logits
        torch.testing.assert_close(logits["grouped_mm"], logits["eager"], atol=3e-5, rtol=3e-5)
        torch.testing.assert_close(logits["batched_mm"], logits["eager"], atol=3e-5, rtol=3e-5)

    @pytest.mark.parametrize("attention", ["eager", "sink_attention"])
    def test_gradient_checkpointing_changes_nothing(self, mixed: Any, attention: str) -> None:
        mixed.set_attn_implementation(attention)
        gradients = []
        for checkpointing in (False, True):
            model = deepcopy(mixed).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing is checkpointing for layer in model.model.layers)
            model(prompts(), labels=prompts(), use_cache=False).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())

    @pytest.mark.parametrize("attention", ["eager", "sink_attention"])
    @pytest.mark.parametrize("use_cache", [None, False])
    def test_packed_documents_do_not_see_each_other(self, mixed: Any, attention: str, use_cache: bool | None) -> None:
        mixed.set_attn_implementation(attention)
        lengths = [13, 1, 16]
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
        packed = mixed(prompts(), position_ids=positions, use_cache=use_cache).logits
        alone = torch.cat([mixed(document).logits for document in prompts().split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(packed, alone, atol=3e-5, rtol=3e-5)


class TestFolders:
    def test_save_and_load_gives_the_same_logits_and_carries_the_code(self, mixed: Any, tmp_path: Path) -> None:
        mixed.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is GptOssPuzzleForCausalLM
        assert torch.equal(loaded(prompts()).logits, mixed(prompts()).logits)
        assert Path(source.__file__).read_bytes() == (tmp_path / "gpt_oss.py").read_bytes()

    @pytest.mark.slow
    def test_the_carried_code_works_without_this_package(self, tiny_model: GptOssForCausalLM, tmp_path: Path) -> None:
        child = pruned(tiny_model, MIXES["wide, full, narrow"])
        child.save_pretrained(tmp_path / "child")
        torch.save(child(prompts()).logits, tmp_path / "logits.pt")
        script = f"""
import sys, torch
sys.modules["lit_puzzle"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "child")!r}, trust_remote_code=True)
ids = torch.tensor({prompts().tolist()})
torch.set_num_threads(1)
assert torch.equal(model(ids).logits, torch.load({str(tmp_path / "logits.pt")!r}))
assert type(model).__module__.startswith("transformers_modules")
assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (3, 33)
"""
        environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)

    def test_an_mxfp4_folder_is_read_and_written_back_dequantized(self, tiny_config: Any, tmp_path: Path) -> None:
        config = tiny_config(hidden_size=32, intermediate_size=32, dtype="bfloat16")
        mix = [(8, 8), (3, 20), (8, 2), (5, None)]
        child = GptOssPuzzleForCausalLM._from_config(GptOssPuzzleConfig.from_parent(config, blocks_of(mix)))
        child.save_pretrained(tmp_path / "bf16")
        expected = mxfp4_twin(tmp_path / "bf16", tmp_path / "mxfp4")
        for quantization in ({}, {"quantization_config": Mxfp4Config(dequantize=True)}):
            model, report = AutoModelForCausalLM.from_pretrained(
                tmp_path / "mxfp4", dtype="bfloat16", output_loading_info=True, **quantization
            )
            assert not any(report.values())
            experts = {name: value for name, value in model.state_dict().items() if name in expected}
            assert len(experts) == 8
            assert all(torch.equal(value, expected[name]) for name, value in experts.items())
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="bfloat16")
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(again(prompts()).logits, model(prompts()).logits)


def mxfp4_twin(folder: Path, target: Path) -> dict[str, Tensor]:
    """Copies a folder with random MXFP4 experts and KV scales in it; returns transformers' reading of the experts."""
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(3)
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = value
            continue
        experts, inner, outer = value.shape
        stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16), generator=generator).byte()
        stored[f"{name}_scales"] = torch.randint(118, 126, (experts, outer, inner // 32), generator=generator).byte()
        expected[name] = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    for layer in range(4):
        stored |= {f"model.layers.{layer}.self_attn.{which}_scale": torch.tensor(0.5) for which in "kv"}
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (target / "config.json").write_text(json.dumps(config))
    return expected


class TestReleasedArchitecture:
    FULL = (1, 7, 9, 11, 13, 15, 17, 19, 25, 29)
    HALVED = (15, 17, 19, *range(21, 36))

    @pytest.fixture
    def released(self) -> GptOssPuzzleConfig:
        windows = [None if i in self.FULL else 8192 if i % 2 else 128 for i in range(36)]
        return GptOssPuzzleConfig(
            block_configs=blocks_of([(64 if i in self.HALVED else 128, window) for i, window in enumerate(windows)]),
            max_position_embeddings=229376,
        )

    def test_builds_in_seconds_with_the_published_parameters(self, released: GptOssPuzzleConfig) -> None:
        begin = time.perf_counter()
        with torch.device("meta"):
            child, parent = GptOssPuzzleForCausalLM(released), GptOssForCausalLM(GptOssConfig())
        assert time.perf_counter() - begin < 10
        assert sum(parameter.numel() for parameter in child.parameters()) == 88_150_438_080
        assert sum(parameter.numel() for parameter in parent.parameters()) == 116_829_156_672

    def test_keeps_41_6_percent_fewer_keys_and_values_at_128k(self, released: GptOssPuzzleConfig) -> None:
        kept = []
        for config in (released, GptOssConfig()):
            cache, states = DynamicCache(config=config), torch.empty(1, 8, 131072, 64, device="meta")
            for layer in range(36):
                cache.update(states, states, layer)
            kept.append(sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers))
        assert 1 - kept[0] / kept[1] == pytest.approx(0.416, abs=5e-4)
