"""Which parameters of a child train, in float32, and by which optimizer.

By default experts and router are frozen, as in the paper's distillation and reinforcement learning; low-rank adapters
are an option (`lit_puzzle.training.settings`). Reads and writes nothing.
Source: arXiv 2602.11937 (what is frozen); LoRA, arXiv 2106.09685.
"""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lit_puzzle.training.settings import LoraSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_adapters(model: "PreTrainedModel", settings: LoraSettings) -> "PeftModel":
    """Return the model inside a LoRA wrapper, in which only the adapters train."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


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


def keep_master_weights(model: nn.Module) -> None:
    """Turn every parameter that trains into float32; beside frozen bfloat16 ones, precision must be mixed."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


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
    """
    built = optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    if lr_scheduler is None:
        return built
    return {"optimizer": built, "lr_scheduler": {"scheduler": lr_scheduler(built), "interval": "step"}}
