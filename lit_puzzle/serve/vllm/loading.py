"""Load the tensors of a checkpoint into vLLM's gpt_oss_puzzle, with strict checks, at the start and in every reload.

Reads (name, tensor) pairs under the names of checkpoint files. The tensors must be exactly those that the configuration
implies (`lit_puzzle.model.layout`), in their shapes, each given once; vLLM's own gpt-oss loader skips unknown names.
Experts are plain or MXFP4, layer by layer; where vLLM computes in floating point, MXFP4 is dequantized here, one expert
at a time.

Every copy goes through a parameter's `weight_loader`, with one call for each expert: it selects the part of this rank
in tensor and expert parallelism, and vLLM's reload intercepts it. A reload may leave out experts, router and KV scales,
each for all layers or none, because RL recovery does not train them. After a refused reload the engine is unusable.

Memory in addition to the model: one checkpoint tensor and, for MXFP4 that is dequantized, one expert.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.utils.torch_utils import is_quantized_kv_cache

from lit_puzzle.generation.trained_weights import FROZEN, KV_SCALES
from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.model.layout import Shape, layer_blocks, layer_prefix, tensor_shapes
from lit_puzzle.model.mxfp4 import dequantize

NAMES = GPT_OSS.layer
SHARDS = {"gate_up_proj": ("w13", "gpt_oss_w13"), "down_proj": ("w2", "gpt_oss_w2")}  # of vLLM's gpt-oss experts
OUTSIDE = {
    "model.embed_tokens.weight": "model.embedding.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def load_weights(model: nn.Module, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Load all tensors of a checkpoint, or, into a model that vLLM is reloading, those that were trained.

    Args:
        model: vLLM's gpt_oss_puzzle, newly built or being reloaded by `collective_rpc("reload_weights")`.
        config: config.json of the checkpoint.
        weights: names of checkpoint files and tensors, in any order.

    Returns:
        The names of all parameters, all of which were loaded (vLLM checks it).

    Raises:
        ValueError: a tensor is unknown, missing, given twice or of a wrong shape, or a KV scale cannot be used.
    """
    reloading = is_reloading(model)
    loader = Loader(model, config)
    for name, tensor in weights:
        loader.load(name, tensor)
    loader.check_complete(reloading)
    loader.check_scales()
    return {name for name, _ in model.named_parameters()}


def is_reloading(model: nn.Module) -> bool:
    """Return whether vLLM is reloading a model: its parameters are then on the meta device."""
    return model.get_parameter(OUTSIDE["model.embed_tokens.weight"]).is_meta


class Loader:
    """One pass over the tensors of a checkpoint.

    Attributes:
        seen: names of the tensors so far.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        self._model = model
        self._config = config
        self._layers = len(layer_blocks(self._config))
        self._plain = tensor_shapes(self._config)
        self._packed = self._packed_shapes()
        self._half: dict[str, Tensor] = {}  # blocks whose scales have not come yet, or the reverse
        self.seen: set[str] = set()

    def _packed_shapes(self) -> dict[str, Shape]:
        if self._config["hidden_size"] % 32 or self._config["intermediate_size"] % 32:
            return {}  # MXFP4 cannot store such sizes
        return tensor_shapes(self._config, range(self._layers))

    def load(self, name: str, tensor: Tensor) -> None:
        """Check and copy one tensor; a pipeline stage skips layers of other stages."""
        self._check(name, tensor)
        self.seen.add(name)
        if not name.startswith("model.layers."):
            _copy(self._model.get_parameter(OUTSIDE[name]), tensor)
            return
        number, _, inside = name.removeprefix("model.layers.").partition(".")
        layer = self._layer(int(number))
        if layer is None:
            return
        if inside.startswith(f"{NAMES.experts}."):
            self._copy_experts(layer.get_submodule("mlp.experts").get_submodule("routed_experts"), name, tensor)
        elif inside in NAMES.kv_scales:
            scales = dict(layer.get_submodule("attn.attn").named_parameters(recurse=False))  # none with fp8_e5m2
            if scales:
                _copy(scales[inside.removeprefix(f"{NAMES.attention}.")], tensor)
        else:
            _copy_in_layer(layer, inside, tensor)

    def _layer(self, number: int) -> nn.Module | None:
        """Return a decoder layer; None if it is on another pipeline stage."""
        layer = self._model.get_submodule(f"model.layers.{number}")
        return None if isinstance(layer, PPMissingLayer) else layer

    def _check(self, name: str, tensor: Tensor) -> None:
        if name in self.seen:
            raise ValueError(f"{name} is given twice.")
        scales = [layer_prefix(layer) + scale for layer in range(self._layers) for scale in NAMES.kv_scales]
        if name in scales:
            _check_scale(name, tensor)
            return
        shape = self._plain.get(name, self._packed.get(name))
        if shape is None:
            raise ValueError(
                f"Unknown tensor {name} of shape {tuple(tensor.shape)}: the configuration implies no such tensor."
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the configuration implies {shape}.")

    def _copy_experts(self, experts: Any, name: str, tensor: Tensor) -> None:
        """Copy a tensor of all experts of a layer, expert by expert."""
        whole, _, kind = name.rpartition("_")
        is_packed = isinstance(experts.quant_method, GptOssMxfp4MoEMethod)
        if kind == "bias":
            _copy_each(experts, whole, "bias", tensor)
        elif kind not in ("blocks", "scales"):  # `gate_up_proj`, `down_proj`
            if is_packed:
                raise ValueError(
                    f"{name} is plain, and vLLM holds this layer's experts as MXFP4. Name the layer in the "
                    "modules_to_not_convert of config.json's quantization_config, or give blocks and scales."
                )
            _copy_each(experts, name, "weight", tensor)
        elif is_packed:
            _copy_each(experts, whole, "weight" if kind == "blocks" else "weight_scale", tensor)
        elif whole in self._half:
            both = {kind: tensor, "blocks" if kind == "scales" else "scales": self._half.pop(whole)}
            _copy_each(experts, whole, "weight", both["blocks"], both["scales"])
        else:
            self._half[whole] = tensor

    def check_complete(self, reloading: bool) -> None:
        """Check that all tensors were given; in a reload, all but those of frozen kinds.

        Raises:
            ValueError: a tensor is missing, or experts are given plain and as MXFP4.
        """
        scales = {name for name in self.seen if name.endswith(KV_SCALES)}
        packed_layers = {name.split(".")[2] for name in self.seen if name.endswith("_blocks")}
        if not any(f".{NAMES.experts}." in name for name in self.seen):
            packed_layers = set()
        expected = set(tensor_shapes(self._config, {int(layer) for layer in packed_layers})) | {
            name[: -len("k_scale")] + kind + "_scale" for name in scales for kind in "kv"
        }
        missing = expected - self.seen
        if reloading:
            absent = [kind for kind in FROZEN if not any(kind in name for name in self.seen)]
            missing = {name for name in missing if not any(kind in name for kind in absent)}
        doubled = self.seen - expected
        if missing or doubled:
            first = min(missing or doubled)
            what = "missing" if missing else "given both plain and as MXFP4, or in part"
            raise ValueError(
                f"{len(missing or doubled)} tensors of the checkpoint are {what}, the first {first}. A checkpoint must "
                "contain all; a reload may leave out experts, router or KV scales, each for all layers."
            )

    def check_scales(self) -> None:
        """Check that every layer with an FP8 cache has KV scales, if any has.

        Raises:
            ValueError: some layers with an FP8 cache have none.
        """
        scaled = {int(name.split(".")[2]) for name in self.seen if name.endswith(KV_SCALES)}
        unscaled = [layer for layer in range(self._layers) if layer not in scaled and self._has_fp8_cache(layer)]
        if scaled and unscaled:
            raise ValueError(
                f"The checkpoint has KV scales, but none for layers {unscaled}, whose values would saturate at 448. "
                f"Leave their cache unquantized: --kv-cache-dtype-skip-layers {' '.join(map(str, unscaled))}"
            )

    def _has_fp8_cache(self, number: int) -> bool:
        layer = self._layer(number)
        if layer is None:
            return False
        attention = layer.get_submodule("attn.attn")
        assert isinstance(attention, Attention)
        return is_quantized_kv_cache(attention.kv_cache_dtype)


def _check_scale(name: str, tensor: Tensor) -> None:
    if tensor.numel() != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: vLLM's FP8 cache has one scale for K and one for V of a layer. "
            "Calibrate per tensor, not per head."
        )
    if not (math.isfinite(tensor.item()) and tensor.item() > 0):
        raise ValueError(f"{name} is {tensor.item()}: a KV scale is a finite number above 0.")


def _copy_in_layer(layer: nn.Module, inside: str, tensor: Tensor) -> None:
    """Copy a tensor other than experts and KV scales: `self_attn.q_proj.weight`, `mlp.router.bias`, a norm."""
    name = inside.replace(f"{NAMES.attention}.", "attn.")
    for projection in ("q", "k", "v"):
        if f".{projection}_proj." in name:
            param = layer.get_parameter(name.replace(f".{projection}_proj.", ".qkv_proj."))
            _loader_of(param)(param, tensor, projection)
            return
    _copy(layer.get_parameter(name), tensor)


def _copy(param: nn.Parameter, tensor: Tensor) -> None:
    _loader_of(param)(param, tensor)


def _loader_of(param: nn.Parameter) -> Callable[..., object]:
    """Return the parameter's own loader; replicated parameters have none and take the whole tensor."""
    return getattr(param, "weight_loader", default_weight_loader)


def _copy_each(experts: nn.Module, whole: str, kind: str, values: Tensor, scales: Tensor | None = None) -> None:
    """Copy every expert of `gate_up_proj` or `down_proj`; with scales, dequantize MXFP4 values first."""
    param_name, shard = SHARDS[next(matrix for matrix in NAMES.expert_matrices if whole.endswith(matrix))]
    param = experts.get_parameter(f"{param_name}_{kind}")
    for expert in range(values.shape[0]):
        one = values[expert]
        if scales is not None:
            one = dequantize(one, scales[expert], torch.promote_types(param.dtype, torch.bfloat16)).T
        place = {"weight_name": f"{param_name}_{kind}", "shard_id": shard, "expert_id": expert}
        _loader_of(param)(param, one, **place, return_success=True)
        param = experts.get_parameter(f"{param_name}_{kind}")
