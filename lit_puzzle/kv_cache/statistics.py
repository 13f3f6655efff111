"""Statistics of the keys (after RoPE) and values of a model over calibration data, and the scales they lead to.

Every forward pass without a cache inside `recording` is counted, packed documents included, padding excluded. Counts
are summed, and amax is the maximum, over batches and processes; both are exact: two processes find the same as one.

Reads and writes nothing. Memory, and traffic between processes (once): 8 L (G + 65536 h) + 8 bytes for L layers and G
key/value heads, with h = G if each head has its own scale and h = 1 otherwise; 120B: 19 MB, or 151 MB. In addition 20
bytes for each key or value of one layer in the batch while that layer runs.
Source: arXiv 2602.11937 (scales by amax); formulas in `lit_puzzle.kv_cache.fp8`.
Shapes: B rows, T tokens, N counted tokens, G heads, C channels; L layers, S kinds (keys, values), H sets of counts
(heads, or 1), M magnitudes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from lit_puzzle.kv_cache.fp8 import (
    MAGNITUDES,
    amax_scale,
    count_magnitudes,
    least_error_scale,
    overflow,
    percentile,
    power_of_two_up,
)
from lit_puzzle.kv_cache.scales import KVScales, LayerScales, ScalePair, TensorScale, Window, check_positive
from lit_puzzle.kv_cache.settings import ScaleSettings
from lit_puzzle.model.family import family_named
from lit_puzzle.model.modules import attention_of, model_family


class KVStatistics:
    """Largest magnitudes and counts of magnitudes of the keys and values of every layer.

    Args:
        model: model whose keys and values are counted.
        per_head: whether each head has its own counts.
        device: device of the counts.
        model_type: of the checkpoint, where the model in memory is of another type.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        per_head: bool,
        device: torch.device | str = "cpu",
        model_type: str | None = None,
    ) -> None:
        layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        self.per_head = per_head
        self.model_type = model_type or model.config.model_type
        self.tokens = 0
        self.amax_LSG = torch.zeros(layers, 2, heads, device=device)
        sets = heads if per_head else 1
        self.counts_LSHM = torch.zeros(layers, 2, sets, MAGNITUDES, dtype=torch.int64, device=device)

    def add(self, layer: int, kind: int, x_NGC: Tensor) -> None:
        """Count keys (kind 0) or values (kind 1) of a layer."""
        if len(x_NGC):
            largest_G = x_NGC.detach().float().abs().amax(dim=(0, 2))
            self.amax_LSG[layer, kind] = torch.maximum(self.amax_LSG[layer, kind], largest_G)
            self.counts_LSHM[layer, kind] += count_magnitudes(x_NGC.detach(), self.per_head)

    def check_finite(self, when: str) -> None:
        """Check that all keys and values so far are finite.

        Args:
            when: what was counted last, for the message.

        Raises:
            ValueError: some are not; names the first such layer.
        """
        broken = (~self.amax_LSG.isfinite()).nonzero()
        if len(broken):
            layer, kind, _ = broken[0].tolist()
            raise ValueError(
                f"{('Keys', 'Values')[kind]} of layer {layer} are not finite after {when}. Check the "
                "checkpoint for NaN weights, or load it with more precision."
            )

    def over_processes(self) -> "KVStatistics":
        """Return the statistics of all processes, on each process and on the CPU; leaves these unchanged."""
        total = object.__new__(KVStatistics)
        total.per_head, total.model_type = self.per_head, self.model_type
        tokens, amax_LSG, counts_LSHM = self._tensors()
        if distributed.is_initialized():
            tokens = tokens.to(amax_LSG.device)
            distributed.all_reduce(amax_LSG, distributed.ReduceOp.MAX)
            for sums in (tokens, counts_LSHM):
                distributed.all_reduce(sums, distributed.ReduceOp.SUM)
        total.tokens, total.amax_LSG, total.counts_LSHM = int(tokens), amax_LSG.cpu(), counts_LSHM.cpu()
        return total

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor(self.tokens), self.amax_LSG.clone(), self.counts_LSHM.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts so far."""
        return dict(zip(("tokens", "amax", "counts"), (tensor.cpu() for tensor in self._tensors()), strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the counts of `state_dict`.

        Raises:
            ValueError: they are of another model or of other settings.
        """
        given = tuple(state["amax"].shape), tuple(state["counts"].shape)
        own = tuple(self.amax_LSG.shape), tuple(self.counts_LSHM.shape)
        if given != own:
            raise ValueError(
                f"The saved KV statistics have shapes {given}, this run has {own}: resume with the same checkpoint and "
                "per_head, or start again with --overwrite."
            )
        self.tokens = int(state["tokens"])
        self.amax_LSG.copy_(state["amax"])
        self.counts_LSHM.copy_(state["counts"])


class _Recorder:
    """Object in the place of attention's cache that counts keys and values and stores nothing."""

    def __init__(self, statistics: KVStatistics, counted_BT: Tensor) -> None:
        self.statistics, self.counted_BT = statistics, counted_BT

    def update(self, keys_BGTC: Tensor, values_BGTC: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        for kind, x_BGTC in enumerate((keys_BGTC, values_BGTC)):
            self.statistics.add(layer_idx, kind, x_BGTC.transpose(1, 2)[self.counted_BT])
        return keys_BGTC, values_BGTC


@contextmanager
def recording(model: PreTrainedModel, statistics: KVStatistics, counted_BT: Tensor) -> Iterator[None]:
    """Count the keys and values of one forward pass, run inside the context without a cache.

    Args:
        model: causal language model without a LoRA wrapper.
        statistics: statistics that the pass is added to.
        counted_BT: tokens of the batch that are counted, boolean.
    """
    statistics.tokens += int(counted_BT.sum())
    with recording_layers(model, list(model.model.layers), statistics, counted_BT):
        yield


@contextmanager
def recording_layers(
    model: PreTrainedModel, layers: Sequence[nn.Module], statistics: KVStatistics, counted_BT: Tensor
) -> Iterator[None]:
    """Count the keys and values of some decoder layers inside the context; the tokens are not counted.

    Args:
        model: the model of the layers.
        layers: decoder layers.
        statistics: statistics that they are added to.
        counted_BT: tokens of the batch that are counted, boolean.
    """
    recorder = _Recorder(statistics, counted_BT)

    def pass_recorder(_: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, keywords | {"past_key_values": recorder}

    family = model_family(model)
    attentions = [attention_of(layer, family) for layer in layers]
    hooks = [attention.register_forward_pre_hook(pass_recorder, with_kwargs=True) for attention in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def find_scales(
    statistics: KVStatistics, settings: ScaleSettings, windows: Sequence[Window], fingerprint: str
) -> KVScales:
    """Return the scales of a checkpoint.

    Args:
        statistics: statistics over all processes.
        settings: how scales follow from them.
        windows: window of each layer in tokens; None: full attention.
        fingerprint: fingerprint of the checkpoint.

    Raises:
        ValueError: no token was counted, or an amax is zero or not finite (names the layer).
    """
    if statistics.tokens == 0:
        raise ValueError("No token was counted: the calibration data is empty. Give the data module some sequences.")
    found: list[ScalePair | None] = []
    for layer, window in enumerate(windows):
        if window is not None and settings.windowed_layers == "bf16":
            found.append(None)
        else:
            found.append((_scale(statistics, settings, layer, 0), _scale(statistics, settings, layer, 1)))
    layers = apply_scales(statistics, found)
    return KVScales(fingerprint, statistics.model_type, settings.method, settings.rounding, statistics.tokens, layers)


def apply_scales(statistics: KVStatistics, scales: Sequence[ScalePair | None]) -> tuple[LayerScales | None, ...]:
    """Return amax and overflow of the counted keys and values under given scales."""
    layers: list[LayerScales | None] = []
    for layer, pair in enumerate(scales):
        if pair is None:
            layers.append(None)
        else:
            layers.append(LayerScales(*(_apply(statistics, layer, kind, pair[kind]) for kind in (0, 1))))
    return tuple(layers)


def _apply(statistics: KVStatistics, layer: int, kind: int, scale: Tensor) -> TensorScale:
    amax_G, counts_HM = statistics.amax_LSG[layer, kind], statistics.counts_LSHM[layer, kind]
    saturated = sum(overflow(counts_M, one) for counts_M, one in zip(counts_HM, scale.reshape(-1), strict=True))
    return TensorScale(amax_G.max() if scale.ndim == 0 else amax_G, scale, saturated)


def _scale(statistics: KVStatistics, settings: ScaleSettings, layer: int, kind: int) -> Tensor:
    """Return the scale of the keys or values of a layer: a scalar, or one for each head."""
    amax_G, counts_HM = statistics.amax_LSG[layer, kind], statistics.counts_LSHM[layer, kind]
    amax_H = amax_G if settings.per_head else amax_G.max()[None]
    projection = family_named(statistics.model_type).layer.projections[1 + kind]
    try:
        check_positive(amax_H, f"amax of {'KV'[kind]} in layer {layer}")
    except ValueError as error:
        raise ValueError(
            f"{error}: no scale follows from it. Look for zeroed or broken weights in this layer's {projection}, or "
            "give more calibration data."
        ) from None
    scale_H = torch.stack(
        [_scale_of(counts_M, amax, settings) for counts_M, amax in zip(counts_HM, amax_H, strict=True)]
    )
    return scale_H if settings.per_head else scale_H[0]


def _scale_of(counts_M: Tensor, amax: Tensor, settings: ScaleSettings) -> Tensor:
    power_of_two = settings.rounding == "power_of_two"
    if settings.method == "mse":
        return least_error_scale(counts_M, amax, power_of_two)
    top = amax if settings.method == "amax" else percentile(counts_M, settings.percent)
    if top == 0:  # zeros alone reach the percentage
        top = amax
    return power_of_two_up(amax_scale(top)) if power_of_two else amax_scale(top)
