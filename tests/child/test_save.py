"""A saved child has the logits of the model that was trained, whatever trained; it is checked before training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_children import PROMPT
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from lit_puzzle.child.save import save_child
from lit_puzzle.child.trained import check_saved, check_trained, trained_tensors
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.training.load_child import adapted, without_weights
from lit_puzzle.training.settings import LoraSettings, TrainingSettings
from lit_puzzle.training.trainable import without_adapters

EXPERTS = ["experts.gate_up_proj", "experts.down_proj", "experts.down_proj_bias"]
LORA: dict[str, dict[str, Any]] = {
    "attention": {},
    "router": {"target_modules": [], "target_parameters": ["router.weight"]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "everything": {
        "target_modules": ["q_proj", "o_proj", "lm_head", "embed_tokens"],
        "target_parameters": [*EXPERTS, "router.weight"],
    },
}
ADAPTED = {"attention": 16, "router": 4, "experts": 12, "head": 1, "embedding": 1, "everything": 26}  # of 4 layers
FULL: dict[str, list[str] | None] = {"default": None, "all": ["model.layers.0.self_attn.sinks"]}


def lora(**targets: Any) -> TrainingSettings:
    return TrainingSettings(lora=LoraSettings(rank=2, alpha=3, **targets))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT).logits


def train(model: Any) -> None:
    """Change everything that trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def saved_logits(parent: Path, settings: TrainingSettings) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Logits of a trained model and of its saved folder, and the tensors that differ from the parent's."""
    child: Any = adapted(AutoModelForCausalLM.from_pretrained(parent, attn_implementation="eager"), settings)
    train(child)
    expected = logits(child)
    target = parent.parent / "saved"
    save_child(parent, target, without_adapters(child), is_writer=True)
    before, after = Checkpoint(parent), Checkpoint(target)
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    return expected, logits(AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")), changed


@pytest.mark.parametrize("name", LORA)
def test_adapters_on_every_kind_of_module_are_saved(parent: Path, name: str) -> None:
    expected, found, changed = saved_logits(parent, lora(**LORA[name]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(changed) == ADAPTED[name]


@pytest.mark.parametrize("name", FULL)
def test_all_weights_that_train_are_saved(parent: Path, name: str) -> None:
    """Embedding, head, norms, sinks and attention; with another `freeze` experts and router too."""
    expected, found, changed = saved_logits(parent, TrainingSettings(freeze=FULL[name]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    tensors = Checkpoint(parent).tensors
    frozen = {name for name in tensors if ".mlp." in name} if name == "default" else {"model.layers.0.self_attn.sinks"}
    assert set(changed) == set(tensors) - frozen


def tied(folder: Path, tiny_config: Callable[..., Any]) -> Path:
    GptOssForCausalLM(tiny_config(num_hidden_layers=1, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def test_tied_embeddings_are_saved_once(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    folder = tied(tmp_path / "tied", tiny_config)
    expected, found, changed = saved_logits(folder, TrainingSettings())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert "model.embed_tokens.weight" in changed and "lm_head.weight" not in Checkpoint(folder).tensors


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_adapters_on_tied_embeddings_are_refused(tiny_config: Callable[..., Any], tmp_path: Path, module: str) -> None:
    """Merging into the one tensor would change embedding and head, where PEFT changes one of them."""
    with pytest.raises(ValueError, match=r"lm_head\.weight.* are one tensor in .*tied \(tie_word_embeddings\)"):
        check_saved(tied(tmp_path / "tied", tiny_config), lora(target_modules=[module]))


def test_the_check_accepts_what_is_saved_and_leaves_randomness_as_it_was(parent: Path) -> None:
    before = torch.get_rng_state()
    for targets in LORA.values():
        check_saved(parent, lora(**targets))
    check_saved(parent, TrainingSettings(freeze=FULL["all"]))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    random = torch.rand(1)
    torch.manual_seed(0)
    check_saved(parent, lora())
    assert torch.equal(torch.rand(1), random)


class Doubled(torch.nn.Module):
    """A layer of a user's own, which the checkpoint does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))


def test_what_the_checkpoint_has_no_tensor_for_is_refused(parent: Path) -> None:
    model: Any = adapted(without_weights(parent, TrainingSettings()), TrainingSettings())
    model.model.layers[1].extra = Doubled()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.extra\.gain would train, but .* has no tensor"):
        check_trained(model, Checkpoint(parent))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.extra\.gain would train"):
        save_child(parent, parent.parent / "saved", model, is_writer=True)
    del model.model.layers[1].extra
    model.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"model\.norm\.weight would train with shape \(3,\); .* has \(32,\)"):
        check_trained(model, Checkpoint(parent))
    assert not (parent.parent / "saved").exists()


def test_experts_stored_as_mxfp4_cannot_train(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    from helpers.vllm_folders import write_folder

    folder = write_folder(tmp_path / "packed", mxfp4=True)
    check_saved(folder, TrainingSettings())
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj would train, .*quantized experts cannot be trained"):
        check_saved(folder, TrainingSettings(freeze=["*.router.*"]))


def test_values_that_are_not_finite_are_not_saved(parent: Path) -> None:
    model: Any = adapted(AutoModelForCausalLM.from_pretrained(parent), TrainingSettings())
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"model\.norm\.weight has trained values that are not finite"):
        save_child(parent, parent.parent / "saved", model, is_writer=True)
    assert not (parent.parent / "saved").exists()


def test_every_trained_parameter_belongs_to_one_tensor(parent: Path) -> None:
    """The parameters of all adapters are covered; nothing trains that no tensor gets."""
    settings = lora(**LORA["everything"])
    model: Any = without_adapters(adapted(without_weights(parent, settings), settings))
    names = set(trained_tensors(model))
    assert len(names) == ADAPTED["everything"] and names <= set(Checkpoint(parent).tensors)
