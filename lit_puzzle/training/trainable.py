"""Which parameters of a child train, how, and by which optimizer.

By default experts and router are frozen, as in the paper's distillation and reinforcement learning; what trains is kept
in float32; adapters are an option. Reads and writes: nothing.
Source: arXiv 2602.11937 (what is frozen); LoRA, arXiv 2106.09685.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FROZEN = ["*.mlp.experts.*", "*.mlp.router.*"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of full fine-tuning.

    Args:
        rank: inner dimension.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapter's input.
        target_modules: names of the linear layers that get an adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.target_modules:
            raise ValueError(
                f"lora.rank={self.rank}, alpha={self.alpha}, target_modules={self.target_modules} were given; "
                "rank >= 1, alpha > 0 and at least one module name are needed."
            )

    def wrap(self, model: "PreTrainedModel") -> "PeftModel":
        """The model inside a LoRA wrapper: only the adapters are trainable."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


def freeze_parameters(model: nn.Module, patterns: list[str]) -> None:
    """Freezes the parameters whose names match a pattern (`*` stands for anything).

    Raises:
        ValueError: a pattern that matches nothing, or nothing left to train.
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
    """Turns every parameter that trains into float32; with frozen bfloat16 beside it, precision must be mixed."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def optimize_trainable(
    module: nn.Module,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    lr_scheduler: Callable[[Optimizer], Any] | None,
) -> Any:
    """For `configure_optimizers`: an optimizer over the trainable parameters, and a schedule that counts updates."""
    built = optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    if lr_scheduler is None:
        return built
    return {"optimizer": built, "lr_scheduler": {"scheduler": lr_scheduler(built), "interval": "step"}}
