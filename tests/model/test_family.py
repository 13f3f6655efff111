"""What `model/family.py` says of gpt-oss, held against stock transformers and the released checkpoint layout."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.released_twin import TWIN_CONFIG, twin_tensors
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssExperts, GptOssMLP, GptOssTopKRouter

from lit_puzzle.model.blocks import block_config, build_layer, config_class, model_class, puzzle_config
from lit_puzzle.model.family import FAMILIES, GPT_OSS, family_named, family_of, is_child
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.model.modules import attention_of, decoder_layer, expert_weights, moe_of, restricted, route, router_of

ROOT = Path(__file__).parents[2]


def test_names_are_those_of_the_stock_modules(tiny_model: GptOssForCausalLM) -> None:
    layer, names = decoder_layer(tiny_model, 1), GPT_OSS.layer
    assert type(attention_of(layer, GPT_OSS)) is GptOssAttention
    assert type(router_of(layer, GPT_OSS)) is GptOssTopKRouter
    assert type(moe_of(layer, GPT_OSS)) is GptOssMLP
    assert type(layer.get_submodule(names.experts)) is GptOssExperts
    linear = {name for name, module in attention_of(layer, GPT_OSS).named_modules() if isinstance(module, nn.Linear)}
    assert linear == set(names.projections)
    halves = names.attention_half + names.expert_half
    for name, _ in layer.named_parameters():
        assert sum(name.startswith(half) for half in halves) == 1, name


def test_expert_rows_are_the_tensors_whose_shape_follows_the_number_of_experts(
    tiny_config: Callable[..., GptOssConfig],
) -> None:
    shapes = []
    for experts in (5, 7):  # numbers that no other size of the model equals
        with torch.device("meta"):
            layer = GptOssForCausalLM(tiny_config(num_local_experts=experts, num_experts_per_tok=2)).model.layers[0]
        shapes.append({name: tuple(tensor.shape) for name, tensor in layer.named_parameters()})
    changed = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert all(shapes[0][name][0] == 5 for name in changed)
    released = {name.removeprefix("model.layers.0.") for name in twin_tensors() if name.startswith("model.layers.0.")}
    packed = {name for name in released if "experts" in name}
    assert changed | packed == GPT_OSS.layer.expert_rows
    assert set(GPT_OSS.layer.kv_scales) <= released


def test_defaults_of_the_configuration_are_the_stock_ones() -> None:
    keys, config = GPT_OSS.config, GptOssConfig(num_hidden_layers=5)
    for key in (keys.num_experts, keys.experts_per_token, keys.expert_width, keys.window):
        assert isinstance(config.to_dict()[key], int), key
    assert config.attention_bias is keys.attention_bias
    assert config.layer_types == [keys.layer_types[layer % 2] for layer in range(5)]
    assert config.vocab_size == GPT_OSS.vocab_size


def test_a_routed_layer_is_the_stock_one(tiny_model: GptOssForCausalLM) -> None:
    layer = decoder_layer(tiny_model, 0)
    router, weights = router_of(layer, GPT_OSS), expert_weights(moe_of(layer, GPT_OSS))
    hidden_ND = torch.randn(11, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_NE, gates_NK, experts_NK = router(hidden_ND)
        mine = route(logits_NE, router.top_k)
        stock_ND, _ = moe_of(layer, GPT_OSS)(hidden_ND[None])
        outputs = torch.stack([weights.output(expert, hidden_ND) for expert in range(router.num_experts)], dim=1)
        mixed_ND = torch.stack([gates_NK[n] @ outputs[n, experts_NK[n]] for n in range(11)])
    assert torch.equal(mine[0], gates_NK) and torch.equal(mine[1], experts_NK)
    torch.testing.assert_close(mixed_ND, stock_ND[0])
    with torch.no_grad(), restricted(router, [1, 2, 6]):
        assert set(router(hidden_ND)[2].flatten().tolist()) <= {1, 2, 6}
    assert torch.equal(router(hidden_ND)[2], experts_NK)


def test_the_child_classes_are_those_of_the_modeling_file(tiny_config: Callable[..., GptOssConfig]) -> None:
    child = GPT_OSS.child
    assert config_class(GPT_OSS) is GptOssPuzzleConfig and config_class(GPT_OSS).__name__ == child.config_class
    assert model_class(GPT_OSS) is GptOssPuzzleForCausalLM and model_class(GPT_OSS).__name__ == child.model_class
    config = puzzle_config(tiny_config().to_dict(), [block_config(3, 4), block_config(5, None)])
    assert type(config) is GptOssPuzzleConfig and config.num_hidden_layers == 2
    layer = build_layer(config, 1)
    assert layer.mlp.router.num_experts == 5 and layer.mlp.experts.config is config
    entries = child.config_entries()
    assert entries["model_type"] == GptOssPuzzleConfig.model_type
    assert f"class {child.config_class}(" in child.modeling_file.read_text()


def test_an_unknown_model_type_names_the_known_ones() -> None:
    assert family_of(TWIN_CONFIG) is family_named("gpt_oss_puzzle") is GPT_OSS
    assert is_child(TWIN_CONFIG) and not is_child({"model_type": "gpt_oss"})
    with pytest.raises(ValueError, match="'llama' is not supported; allowed: gpt_oss, gpt_oss_puzzle"):
        family_of({"model_type": "llama"})


def test_families_have_model_types_of_their_own() -> None:
    types = [name for family in FAMILIES for name in (family.model_type, family.child.model_type)]
    assert len(set(types)) == len(types)


KNOWS_GPT_OSS = ("model/", "serve/", "tiny/", "assets/", "environments/harmony.py")


def test_no_other_room_names_the_types_of_gpt_oss() -> None:
    """Neither its classes, nor its model types, nor its special tokens, in code or in prose."""
    listed = subprocess.check_output(["git", "ls-files", "lit_puzzle", "callbacks"], cwd=ROOT, text=True).split()
    named = []
    for path in listed:
        room = path.removeprefix("lit_puzzle/")
        if path.endswith(".py") and not room.startswith(KNOWS_GPT_OSS):
            text = (ROOT / path).read_text()
            named += [f"{path}: {word}" for word in ("GptOss", "gpt_oss", "<|") if word in text]
    assert named == []
