"""Which parameters of a child train, in float32, and by which optimizer.

By default experts and router are frozen, as in the paper's distillation and reinforcement learning; low-rank adapters
are an option (`lit_puzzle.training.settings`). Reads and writes nothing.
Source: arXiv 2602.11937 (what is frozen); LoRA, arXiv 2106.09685.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_puzzle.training.settings import LoraSettings

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTABLE = (nn.Linear, nn.Embedding)  # modules that an adapter can be put on and merged into


def add_adapters(model: "PreTrainedModel", settings: LoraSettings) -> "PeftModel":
    """Return the model inside a LoRA wrapper, in which only the adapters train.

    Raises:
        ValueError: the reasons of `check_targets`.
    """
    from peft import LoraConfig, get_peft_model

    check_targets(model, settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules or None,
        target_parameters=settings.target_parameters or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def check_targets(model: nn.Module, settings: LoraSettings) -> None:
    """Check that every target of the adapters is a part of the model that can have one.

    Raises:
        ValueError: a name that matches nothing, or a module or parameter that cannot have an adapter.
    """
    modules = dict(model.named_modules())
    suitable = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, ADAPTABLE)})
    for target in settings.target_modules:
        found = [module for name, module in modules.items() if _matches(name, target)]
        if not found:
            raise ValueError(
                f"lora.target_modules: the model has no module {target!r}.{_nearest(target, suitable)} Linear layers "
                f"and embeddings: {', '.join(suitable)}"
            )
        for module in found:
            if not isinstance(module, ADAPTABLE):
                raise ValueError(
                    f"lora.target_modules: {target!r} is a {type(module).__name__}; an adapter goes on a linear layer "
                    f"or an embedding: {', '.join(suitable)}. For its parameters there is lora.target_parameters"
                )
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim in (2, 3)}
    known = sorted({".".join(name.split(".")[-2:]) for name in matrices})
    for target in settings.target_parameters:
        stacked = {name: parameter for name, parameter in matrices.items() if _matches(name, target)}
        if not stacked:
            raise ValueError(
                f"lora.target_parameters: the model has no matrix {target!r}.{_nearest(target, known)} "
                f"Parameters of 2 or 3 dimensions: {', '.join(known)}"
            )
        for name, parameter in stacked.items():
            if parameter.ndim == 3 and len(parameter) == 1:
                raise ValueError(
                    f"lora.target_parameters: {name} stacks a single expert, for which PEFT has no adapter. Train "
                    "other parameters, or without lora"
                )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _nearest(target: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def without_adapters(model: "PreTrainedModel | PeftModel") -> "PreTrainedModel":
    """Return the causal language model inside any LoRA wrapper."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match a pattern (`*` stands for any text).

    Raises:
        ValueError: a pattern that matches nothing, or patterns that leave nothing to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"freeze: {pattern!r} matches no parameter; names look like {names[len(names) // 2]!r}.")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: {patterns} leaves nothing to train. Remove a pattern.")


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match none of the patterns (`*` stands for any text)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))


def keep_master_weights(model: nn.Module) -> None:
    """Turn every parameter that trains into float32; beside frozen bfloat16 ones, precision must be mixed."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def compute_in_autocast_dtype(model: "PreTrainedModel") -> None:
    """Under autocast, turn what the embedding returns into autocast's dtype.

    All that follows has it then: the residual stream, the rotary tables, the KV cache, and the inputs of layers that
    activation checkpointing keeps. Without it a trained float32 embedding makes them float32. Norms compute in float32
    all the same. Without autocast nothing changes.
    """
    model.get_input_embeddings().register_forward_hook(_in_autocast_dtype)


def _in_autocast_dtype(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
    device = embedded.device.type
    return embedded.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else embedded


def give_head_contiguous_states(model: "PreTrainedModel") -> None:
    """Under autocast on a CPU, copy the states that the head reads where they are a slice, as in generation.

    PyTorch would copy a frozen head for every row of the batch instead. Without autocast nothing changes.
    """
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)


def _contiguous(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    on_cpu = inputs[0].device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return (inputs[0].contiguous(), *inputs[1:]) if on_cpu else inputs


def optimize_trainable(
    module: nn.Module,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    lr_scheduler: Callable[[Optimizer], Any] | None,
) -> Any:
    """Build what `configure_optimizers` returns: an optimizer over what trains, and a schedule stepped once per update.

    Args:
        module: the LightningModule.
        optimizer: builds the optimizer on parameters.
        lr_scheduler: builds the schedule on the optimizer; None: a constant learning rate.

    Raises:
        ValueError: the optimizer refuses its settings.
    """
    try:
        built = optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from error
    if lr_scheduler is None:
        return built
    return {"optimizer": built, "lr_scheduler": {"scheduler": lr_scheduler(built), "interval": "step"}}


def release_optimizers(trainer: "Trainer") -> None:
    """Free the state of the optimizers and the gradients, which nothing needs after training."""
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
        optimizer.state.clear()


def drop_frozen(module: nn.Module, checkpoint: dict[str, Any], besides: str | None = None) -> None:
    """Keep of a checkpoint's `state_dict` the parameters that train.

    Args:
        module: the LightningModule.
        checkpoint: what Lightning saves; is changed.
        besides: beginning of further names to keep.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    state: dict[str, Tensor] = checkpoint["state_dict"]
    kept = {name for name in state if name in trained or (besides is not None and name.startswith(besides))}
    checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in kept}
