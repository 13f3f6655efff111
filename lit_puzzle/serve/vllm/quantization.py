"""Quantization of children in vLLM: MXFP4 experts and the FP8 KV cache.

Experts stay packed if vLLM has an MXFP4 kernel for the device, the sizes and bfloat16 activations; otherwise they are
dequantized while they are loaded, and computed in the model's dtype. Scales of the KV cache are read from the
checkpoint for every dtype of the experts.

Memory of one layer's experts (E experts, hidden H, intermediate I): 3 E H I values of 17/32 bytes packed, of 2 or 4
bytes dequantized.
"""

from fnmatch import fnmatch
from typing import Any, Self

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.platforms import current_platform

MXFP4 = "gpt_oss_puzzle_mxfp4"  # vLLM's own entry for MXFP4 requires the model type gpt_oss


class PuzzleQuantization(QuantizationConfig):
    """Quantization method of children in vLLM.

    Args:
        unpacked: patterns of module names (`modules_to_not_convert`) that the checkpoint does not store as MXFP4.
    """

    def __init__(self, unpacked: list[str] | None = None) -> None:
        super().__init__()
        self.unpacked = unpacked or []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the method for the `quantization_config` of config.json."""
        return cls(config.get("modules_to_not_convert"))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> str | None:
        """Return our method for MXFP4 checkpoints of children, whose `quant_method` is plain `mxfp4`."""
        is_mxfp4 = isinstance(hf_quant_cfg, dict) and hf_quant_cfg.get("quant_method") in ("mxfp4", MXFP4)
        is_ours = hf_config is not None and "GptOssPuzzleForCausalLM" in (hf_config.architectures or ())
        return MXFP4 if is_mxfp4 and is_ours else None

    @classmethod
    def get_name(cls) -> str:
        """Return the name in `vllm serve --quantization`."""
        return MXFP4

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return all dtypes: experts are dequantized for dtypes without a packed kernel."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the capability of the oldest GPU that vLLM supports, for the same reason."""
        return 70

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """Return no files: the settings are in config.json."""
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of attention (KV scales) or of linear layers; `experts_method` returns that of experts."""
        if isinstance(layer, Attention):
            return BaseKVCacheMethod(self)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def packs(self, prefix: str) -> bool:
        """Return whether the checkpoint stores the experts of a layer (`model.layers.0.mlp.experts`) as MXFP4."""
        return not any(fnmatch(prefix, pattern) or fnmatch(prefix, f"{pattern}.*") for pattern in self.unpacked)


class RepackedExperts(UnquantizedFusedMoEMethod):
    """Plain experts whose weights can be loaded again.

    On a CPU the kernel holds a packed copy of the weights; vLLM updates it only after the first load.
    """

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weights for the kernel after every load."""
        is_reload = self.moe_kernel is not None
        super().process_weights_after_loading(layer)
        if is_reload and current_platform.is_cpu():
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)


def experts_method(prefix: str, quantization: QuantizationConfig | None, moe: FusedMoEConfig) -> FusedMoEMethodBase:
    """Return the method of one layer's experts: packed if there is a kernel, otherwise in the model's dtype."""
    if isinstance(quantization, PuzzleQuantization) and quantization.packs(prefix) and has_mxfp4_kernel(moe):
        from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod

        return GptOssMxfp4MoEMethod(moe)
    return RepackedExperts(moe)


def has_mxfp4_kernel(moe: FusedMoEConfig) -> bool:
    """Return whether vLLM has a kernel for packed experts on this device; its emulation does not count."""
    if moe.in_dtype != torch.bfloat16:
        return False
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend, select_mxfp4_moe_backend

    try:
        backend, _ = select_mxfp4_moe_backend(moe)
    except (NotImplementedError, ValueError):  # raised if no kernel fits
        return False
    return backend not in (Mxfp4MoeBackend.EMULATION, Mxfp4MoeBackend.NONE)
