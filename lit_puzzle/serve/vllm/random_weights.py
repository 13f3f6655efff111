"""Random weights in place of a checkpoint's, so that the speed of an architecture can be measured before it is trained.

vLLM's own `load_format: dummy` draws everything within .001, biases too: the router's bias then decides, all tokens
choose the same experts, and a decoding step reads a handful of them. Here

    weights, router   N(0, 1 / columns), so that every token has experts of its own, all equally often in the mean
    embedding         N(0, 1)
    norms             1
    biases, sinks     0
    MXFP4             random codes with scales of 2^-7
    FP8 KV scales     as if the checkpoint had none

Reads config.json only. Registered with vLLM as load format `random_weights` by importing this file.
"""

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from lit_puzzle.serve.vllm.turns import RANDOM_WEIGHTS

E8M0_OF_2_TO_MINUS_7 = 120  # the exponent of a scale, biased by 127


@register_model_loader(RANDOM_WEIGHTS)
class RandomWeights(BaseModelLoader):
    """Loader of vLLM that draws every parameter from one seed."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: there is nothing to load."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Draw all parameters of a newly built model, before vLLM arranges them for its kernels."""
        scales = {id(p) for part in model.modules() if isinstance(part, Attention) for p in part.parameters()}
        generator: torch.Generator | None = None
        for name, parameter in model.named_parameters():
            if id(parameter) in scales and name.endswith("_scale"):
                continue  # vLLM's -1: none
            generator = generator or torch.Generator(parameter.device).manual_seed(0)
            draw(name, parameter.data, generator)


def draw(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fill one parameter by its name, in place."""
    last = name.rsplit(".", 1)[-1]
    if tensor.dtype == torch.uint8:
        if last.endswith("_scale"):
            tensor.fill_(E8M0_OF_2_TO_MINUS_7)
        else:
            tensor.random_(0, 256, generator=generator)
    elif "norm" in name.rsplit(".", 2)[-2]:
        tensor.fill_(1)
    elif last.endswith("bias") or last == "sinks":
        tensor.zero_()
    else:
        tensor.normal_(0, 1 if "embed" in name else tensor.shape[-1] ** -0.5, generator=generator)
