"""Puts the tensors of a checkpoint into vLLM's gpt_oss_puzzle, strictly, the first time and for every reload.

Reads (name, tensor) pairs under the names of checkpoint files. Every tensor must be one that the configuration implies
(`lit_puzzle.model.layout`), in its shape, given once, and none may be missing: vLLM's own gpt-oss loader skips what it
does not know. Experts come plain or as MXFP4, layer by layer; where vLLM computes plain ones, MXFP4 is de-quantized
here, one expert at a time.

Every copy goes through a parameter's `weight_loader`, with one call for each expert: that is what cuts for tensor and
expert parallelism, and what vLLM's reload of live weights intercepts. A reload may leave out experts, router and KV
scales, each for all layers or none: RL recovery does not train them. A refused reload leaves the engine unusable.

Memory above the model: one checkpoint tensor and, for MXFP4 that is unpacked, one expert.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.utils.torch_utils import is_quantized_kv_cache

from lit_puzzle.model.layout import EXPERT_MATRICES, KV_SCALES, Shape, layer_blocks, layer_prefix, tensor_shapes
from lit_puzzle.model.mxfp4 import dequantize

SHARDS = {"gate_up_proj": ("w13", "gpt_oss_w13"), "down_proj": ("w2", "gpt_oss_w2")}  # of vLLM's gpt-oss experts
OUTSIDE = {
    "model.embed_tokens.weight": "model.embedding.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
FROZEN = (".mlp.experts.", ".mlp.router.", *(f".{name}" for name in KV_SCALES))  # what a reload may leave out


class PuzzleModel(Protocol):
    """What is loaded: vLLM's gpt_oss_puzzle, which imports this module.

    Attributes:
        config: Configuration of the checkpoint.
        model: The decoder inside: `embedding`, `layers`.
        loaded: Whether weights were loaded before.
    """

    config: Any
    model: Any
    loaded: bool

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter of a dotted name."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over names and parameters."""
        ...


def load_weights(model: PuzzleModel, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Loads all tensors of a checkpoint, or, into a model that vLLM is reloading, those that were trained.

    Args:
        model: Freshly built, or being reloaded by `collective_rpc("reload_weights")`.
        weights: Names of checkpoint files and tensors, in any order.

    Returns:
        The names of all parameters, each of which was loaded (vLLM checks it).

    Raises:
        ValueError: A tensor is unknown, mis-shaped, doubled or missing, a KV scale cannot be used, or weights are given
            outside a reload.
    """
    reloading = model.model.embedding.weight.is_meta
    if model.loaded and not reloading:
        raise ValueError(
            "Weights of a running engine were given to load_weights. Use "
            'llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs}), then llm.reset_prefix_cache().'
        )
    loader = Loader(model)
    for name, tensor in weights:
        loader.load(name, tensor)
    loader.check_complete(reloading)
    loader.check_scales()
    model.loaded = True
    return {name for name, _ in model.named_parameters()}


class Loader:
    """One pass over a checkpoint's tensors.

    Attributes:
        seen: Names given so far.
    """

    def __init__(self, model: PuzzleModel) -> None:
        self._model = model
        self._config = model.config.to_dict()
        self._layers = len(layer_blocks(self._config))
        self._plain = tensor_shapes(self._config)
        self._packed = self._packed_shapes()
        self._half: dict[str, Tensor] = {}  # blocks that wait for their scales, or the other way round
        self.seen: set[str] = set()

    def _packed_shapes(self) -> dict[str, Shape]:
        if self._config["hidden_size"] % 32 or self._config["intermediate_size"] % 32:
            return {}  # no MXFP4 file has such sizes
        return tensor_shapes(self._config, range(self._layers))

    def load(self, name: str, tensor: Tensor) -> None:
        """Checks and places one tensor; a pipeline stage skips the layers of others."""
        self._check(name, tensor)
        self.seen.add(name)
        if not name.startswith("model.layers."):
            _put(self._model.get_parameter(OUTSIDE[name]), tensor)
            return
        number, _, inside = name.removeprefix("model.layers.").partition(".")
        layer = self._model.model.layers[int(number)]
        if isinstance(layer, PPMissingLayer):
            return
        if inside.startswith("mlp.experts."):
            self._put_experts(layer.mlp.experts.routed_experts, name, tensor)
        elif inside in KV_SCALES:
            takes = dict(layer.attn.attn.named_parameters(recurse=False))  # none with fp8_e5m2, which has no scales
            if takes:
                _put(takes[inside.removeprefix("self_attn.")], tensor)
        else:
            _put_in_layer(layer, inside, tensor)

    def _check(self, name: str, tensor: Tensor) -> None:
        if name in self.seen:
            raise ValueError(f"{name} is given twice.")
        scale_of = [layer_prefix(layer) + scale for layer in range(self._layers) for scale in KV_SCALES]
        if name in scale_of:
            _check_scale(name, tensor)
            return
        shape = self._plain.get(name, self._packed.get(name))
        if shape is None:
            raise ValueError(
                f"Unknown tensor {name} of shape {tuple(tensor.shape)}: the configuration implies none of that name."
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the configuration implies {shape}.")

    def _put_experts(self, experts: nn.Module, name: str, tensor: Tensor) -> None:
        """Places a tensor of all experts of a layer, expert by expert."""
        whole, _, kind = name.rpartition("_")
        is_packed = isinstance(experts.quant_method, GptOssMxfp4MoEMethod)
        if kind == "bias":
            _put_each(experts, whole, "bias", tensor)
        elif kind not in ("blocks", "scales"):  # `gate_up_proj`, `down_proj`
            if is_packed:
                raise ValueError(
                    f"{name} is plain, and vLLM holds this layer's experts as MXFP4. Name the layer in the "
                    "modules_to_not_convert of config.json's quantization_config, or give blocks and scales."
                )
            _put_each(experts, name, "weight", tensor)
        elif is_packed:
            _put_each(experts, whole, "weight" if kind == "blocks" else "weight_scale", tensor)
        elif whole in self._half:
            both = {kind: tensor, "blocks" if kind == "scales" else "scales": self._half.pop(whole)}
            _put_each(experts, whole, "weight", both["blocks"], both["scales"])
        else:
            self._half[whole] = tensor

    def check_complete(self, reloading: bool) -> None:
        """Raises ValueError unless all tensors were given (in a reload: all but some of the frozen kinds)."""
        scales = {name for name in self.seen if name.endswith(KV_SCALES)}
        packed_layers = {name.split(".")[2] for name in self.seen if name.endswith("_blocks")}
        if not any(".mlp.experts." in name for name in self.seen):
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
            what = "missing" if missing else "plain and as MXFP4 (or given in part)"
            raise ValueError(
                f"{len(missing or doubled)} tensors of the checkpoint are {what}, the first {first}. A file must hold "
                "them all; a reload may leave out experts, router or KV scales, each for all layers."
            )

    def check_scales(self) -> None:
        """Raises ValueError when a layer's cache is FP8 and has no scales while other layers have."""
        scaled = {int(name.split(".")[2]) for name in self.seen if name.endswith(KV_SCALES)}
        bare = [
            number
            for number, layer in enumerate(self._model.model.layers)
            if not isinstance(layer, PPMissingLayer)
            and number not in scaled
            and is_quantized_kv_cache(layer.attn.attn.kv_cache_dtype)
        ]
        if scaled and bare:
            raise ValueError(
                f"The checkpoint has KV scales, but none for layers {bare}, which would be cut off at 448. Leave their "
                f"cache unquantized: --kv-cache-dtype-skip-layers {' '.join(map(str, bare))}"
            )


def _check_scale(name: str, tensor: Tensor) -> None:
    if tensor.numel() != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: vLLM's FP8 cache has one scale a layer for K and one for V. "
            "Calibrate per tensor, not per head."
        )
    if not (math.isfinite(tensor.item()) and tensor.item() > 0):
        raise ValueError(f"{name} is {tensor.item()}: a KV scale is a finite number above 0.")


def _put_in_layer(layer: nn.Module, inside: str, tensor: Tensor) -> None:
    """Places what is neither expert nor KV scale: `self_attn.q_proj.weight`, `mlp.router.bias`, a norm."""
    name = inside.replace("self_attn.", "attn.")
    for projection in ("q", "k", "v"):
        if f".{projection}_proj." in name:
            param = layer.get_parameter(name.replace(f".{projection}_proj.", ".qkv_proj."))
            _loader_of(param)(param, tensor, projection)
            return
    _put(layer.get_parameter(name), tensor)


def _put(param: nn.Parameter, tensor: Tensor) -> None:
    _loader_of(param)(param, tensor)


def _loader_of(param: nn.Parameter) -> Callable[..., object]:
    """The parameter's own loader; replicated parameters have none, and take all of the tensor."""
    return getattr(param, "weight_loader", default_weight_loader)


def _put_each(experts: nn.Module, whole: str, kind: str, values: Tensor, scales: Tensor | None = None) -> None:
    """Places every expert of `gate_up_proj` or `down_proj`; with scales, unpacks MXFP4 values first."""
    param_name, shard = SHARDS[next(matrix for matrix in EXPERT_MATRICES if whole.endswith(matrix))]
    param = experts.get_parameter(f"{param_name}_{kind}")
    for expert in range(values.shape[0]):
        one = values[expert]
        if scales is not None:
            one = dequantize(one, scales[expert], torch.promote_types(param.dtype, torch.bfloat16)).T
        place = {"weight_name": f"{param_name}_{kind}", "shard_id": shard, "expert_id": expert}
        _loader_of(param)(param, one, **place, return_success=True)
        param = experts.get_parameter(f"{param_name}_{kind}")
