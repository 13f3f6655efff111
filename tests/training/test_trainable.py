"""What trains: targets of adapters are checked by name and kind, and settings by value."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import anonymous_memory
from helpers.recovery_runs import forked
from helpers.wide_head import HEAD_BYTES, wide_model
from transformers import DynamicCache, GptOssForCausalLM

from lit_puzzle.cli import main
from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.kv_cache.settings import ScaleSettings
from lit_puzzle.rl.settings import GRPOLossSettings, RewardSettings, RolloutSampling
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.training.load_child import adapted, load_child
from lit_puzzle.training.settings import LoraSettings, TrainingSettings
from lit_puzzle.training.trainable import add_adapters, drop_frozen, give_head_contiguous_states, without_adapters

CHILD = PACKAGE / "assets" / "tiny_child"
SUITABLE = "embed_tokens, k_proj, lm_head, o_proj, q_proj, v_proj"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "misspelled": (
        {"target_modules": ["v_proj", "q_porj"]},
        rf"no module 'q_porj'\. Did you mean 'q_proj'\? .*{SUITABLE}",
    ),
    "of no kind": ({"target_modules": ["router"]}, rf"'router' is a GptOssTopKRouter; .*{SUITABLE}.*target_parameters"),
    "experts": ({"target_modules": ["experts"]}, r"'experts' is a GptOssExperts;"),
    "parameter": ({"target_parameters": ["experts.down_porj"]}, r"no matrix 'experts\.down_porj'\. Did you mean"),
    "vector": ({"target_parameters": ["self_attn.sinks"]}, r"no matrix 'self_attn\.sinks'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_do_not_exist_or_cannot_be_adapted_are_refused(tiny_model: GptOssForCausalLM, name: str) -> None:
    """PEFT itself ignores a name that matches nothing if another one matches."""
    targets, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        add_adapters(tiny_model, LoraSettings(**targets))


def test_a_single_expert_has_no_adapter_of_its_own(tiny_config: Any) -> None:
    model = GptOssForCausalLM(tiny_config(num_local_experts=1, num_experts_per_tok=1))
    with pytest.raises(ValueError, match=r"experts\.down_proj stacks a single expert"):
        add_adapters(model, LoraSettings(target_parameters=["experts.down_proj"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -4}, "rank=-4"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"target_modules": []}, "at least one name"),
        ({"target_parameters": ["router.weight"], "dropout": 0.1}, "no input to drop"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (RolloutSampling, {"temperature": NAN}),
        (RolloutSampling, {"temperature": INF}),
        (RolloutSampling, {"top_p": NAN}),
        (GRPOLossSettings, {"epsilon": NAN}),
        (GRPOLossSettings, {"epsilon_high": INF}),
        (GRPOLossSettings, {"beta": NAN}),
        (RewardSettings, {"correctness": NAN}),
        (RewardSettings, {"length": INF}),
        (RewardSettings, {"length_end": INF}),
        (LossSettings, {"temperature": NAN}),
        (LossSettings, {"hidden": NAN}),
        (LossSettings, {"layer_weights": [1.0, NAN]}),
        (ScaleSettings, {"percent": NAN}),
    ],
)
def test_numbers_that_are_not_finite_are_refused(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nan|inf"):
        kind(**values)


@pytest.mark.parametrize("recipe", ["rl_recover", "distill"])
@pytest.mark.slow
def test_recipes_refuse_a_wrong_target_before_they_load_weights(tmp_path: Path, recipe: str) -> None:
    words = [f"--run_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    words.append("--model.init_args.training.lora={target_modules: [q_porj]}")
    if recipe == "distill":
        words += [f"--model.init_args.child={CHILD}", f"--data.init_args.documents={documents(tmp_path)}"]
        words.append("--data.init_args.sequence_tokens=32")

    def refuse(_: int) -> None:
        with (tmp_path / "said").open("w") as stream:
            sys.stderr = stream
            main(["run", f"recipes/{recipe}.yaml", *words])

    assert forked(1, refuse) == [2]
    message = "error: lora.target_modules: the model has no module 'q_porj'. Did you mean 'q_proj'?"
    assert message in (tmp_path / "said").read_text()


def documents(folder: Path) -> Path:
    """A few documents for the tiny models."""
    from helpers.distillation_runs import random_documents

    from lit_puzzle.data.document_files import write_documents

    write_documents(folder / "documents", random_documents(), PACKAGE / "assets" / "tiny_parent", shard_documents=64)
    return folder / "documents"


@pytest.mark.parametrize("lora", [None, LoraSettings(target_modules=["embed_tokens", "q_proj"])])
def test_under_mixed_precision_nothing_that_is_kept_for_a_token_is_float32(lora: LoraSettings | None) -> None:
    """The inputs of layers, which activation checkpointing keeps, the rotary tables and the KV cache."""
    settings = TrainingSettings(lora=lora, dtype="float32" if lora is None else "bfloat16")
    child = load_child(None, CHILD, settings).train()
    model = without_adapters(child)
    assert model.get_input_embeddings().weight.dtype == (torch.float32 if lora is None else torch.bfloat16)
    seen: list[torch.dtype] = []

    def note(_layer: object, args: tuple[torch.Tensor, ...], given: dict[str, Any]) -> None:
        seen.extend(x.dtype for x in (*args, *given["position_embeddings"]))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    cache = DynamicCache(config=model.config)
    with torch.autocast("cpu", torch.bfloat16):
        output = child(torch.arange(3, 23)[None], past_key_values=cache, use_cache=True, output_hidden_states=True)
    kept = [x.dtype for layer in cache.layers for x in (layer.keys, layer.values)]
    assert set(seen) == set(kept) == {x.dtype for x in output.hidden_states} == {torch.bfloat16}
    output.logits.float().logsumexp(-1).sum().backward()
    assert {x.grad.dtype for x in child.parameters() if x.requires_grad and x.grad is not None} == {torch.float32}
    seen.clear()
    if lora is None:
        child(torch.arange(3, 23)[None])
        assert set(seen) == {torch.float32}


def test_a_part_trains_alone_and_stands_alone_in_the_settings(tiny_model: GptOssForCausalLM) -> None:
    found = {}
    for part in ("attention", "router", "attention_and_router"):
        model = adapted(tiny_model, TrainingSettings(trainable=part))
        found[part] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".self_attn." in name for name in found["attention"])
    assert found["router"] == {f"model.layers.{i}.mlp.router.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert found["attention_and_router"] == found["attention"] | found["router"]
    with pytest.raises(ValueError, match=r"trainable is 'routers'; allowed: \['attention', 'router'"):
        TrainingSettings(trainable="routers")  # type: ignore[arg-type]
    for other in ({"freeze": ["*.bias"]}, {"lora": LoraSettings()}):
        with pytest.raises(ValueError, match="trainable=router was given beside freeze or lora"):
            TrainingSettings(trainable="router", **other)


def test_checkpoints_have_what_trains_and_what_is_named() -> None:
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    state = {**model.state_dict(), "average.bias": torch.zeros(1)}
    checkpoints: list[dict[str, Any]] = [{"state_dict": dict(state), "epoch": 3} for _ in range(2)]
    drop_frozen(model, checkpoints[0])
    drop_frozen(model, checkpoints[1], besides="average.")
    assert [sorted(checkpoint["state_dict"]) for checkpoint in checkpoints] == [["weight"], ["average.bias", "weight"]]
    assert checkpoints[0]["epoch"] == 3


@pytest.mark.slow
def test_under_autocast_a_frozen_head_is_not_copied_for_every_row() -> None:
    """As TRL generates: by transformers, whose head reads a slice of the states."""
    rows, model = 16, wide_model()
    give_head_contiguous_states(model)

    def read() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(input_ids=torch.arange(4 * rows).view(rows, 4), logits_to_keep=1)

    grown = anonymous_memory.peak_bytes(read)
    assert grown < 3 * HEAD_BYTES < rows * HEAD_BYTES / 4, f"{grown / 2**20:.0f} MiB"
