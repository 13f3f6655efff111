"""What the keys (after RoPE) and values of a model are like over calibration data, and the scales that follow.

Every forward pass without a cache inside `recording` is counted, packed documents included; padding is not. Counts add
up, and amax is the maximum, over batches and processes: exactly, so that two processes find what one does.

Reads and writes nothing. Memory, and once the traffic between processes, for L layers and G key/value heads, with h = G
if each head has its scale and h = 1 otherwise: 8 L (G + 65536 h) + 8 bytes; 120B: 19 MB, or 151 MB.
While a layer runs: 20 bytes for each of its keys or values in the batch.
Source: arXiv 2602.11937 (scales by amax); formulas in `lit_puzzle.kv_cache.fp8`.
Shapes: B rows, T tokens, N tokens that count, G heads, C channels; L layers, S kinds (keys, values), H sets of counts
(heads, or 1), M magnitudes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from lit_puzzle.kv_cache.fp8 import (
    MAGNITUDES,
    count_magnitudes,
    least_error_scale,
    overflow,
    percentile,
    power_of_two_up,
    saturating_at,
)
from lit_puzzle.kv_cache.kv_scales import KVScales, LayerScales, TensorScale, check_positive

Window = int | None
Scales = tuple[Tensor, Tensor]  # of keys and of values of a layer; each a scalar or (G)


@dataclass(frozen=True)
class ScaleSettings:
    """How scales follow from calibration data.

    Args:
        method: `amax`: nothing saturates; `percentile`: as much as `percent` says does not; `mse`: least squared error.
        rounding: `power_of_two` rounds scales up (with `mse`: only powers of two are tried); `none` leaves them.
        percent: of the values of a layer, in (0, 100].
        per_head: one scale for each key/value head; else one for a layer, which every engine takes.
        windowed_layers: `bf16` leaves their cache, which is small, as it is.

    Raises:
        ValueError: a percentage that is none.
    """

    method: Literal["amax", "percentile", "mse"] = "amax"
    rounding: Literal["power_of_two", "none"] = "power_of_two"
    percent: float = 99.99
    per_head: bool = False
    windowed_layers: Literal["fp8", "bf16"] = "fp8"

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent={self.percent} was given; it must be above 0 and at most 100.")


class KVStatistics:
    """Largest magnitudes and counts of magnitudes of the keys and values of every layer.

    Args:
        model: whose keys and values are counted.
        per_head: whether each head is counted by itself.
        device: where the counts are.
    """

    def __init__(self, model: PreTrainedModel, per_head: bool, device: torch.device | str = "cpu") -> None:
        layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        self.per_head = per_head
        self.tokens = 0
        self.amax_LSG = torch.zeros(layers, 2, heads, device=device)
        sets = heads if per_head else 1
        self.counts_LSHM = torch.zeros(layers, 2, sets, MAGNITUDES, dtype=torch.int64, device=device)

    def add(self, layer: int, kind: int, x_NGC: Tensor) -> None:
        """Counts the keys (kind 0) or values (kind 1) of tokens."""
        if len(x_NGC):
            largest_G = x_NGC.detach().float().abs().amax(dim=(0, 2))
            self.amax_LSG[layer, kind] = torch.maximum(self.amax_LSG[layer, kind], largest_G)
            self.counts_LSHM[layer, kind] += count_magnitudes(x_NGC.detach(), self.per_head)

    def check_finite(self, batch_idx: int) -> None:
        """Refuses to go on with what is no number.

        Raises:
            ValueError: names the first layer.
        """
        broken = (~self.amax_LSG.isfinite()).nonzero()
        if len(broken):
            layer, kind, _ = broken[0].tolist()
            raise ValueError(
                f"{('Keys', 'Values')[kind]} of layer {layer} are not finite after batch {batch_idx}. Check the "
                "checkpoint for NaN weights, or load it with more precision."
            )

    def over_processes(self) -> "KVStatistics":
        """The statistics of all processes, on each; on the CPU. What is here stays as it was."""
        total = object.__new__(KVStatistics)
        total.per_head = self.per_head
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
        """All of it, to continue with."""
        return dict(zip(("tokens", "amax", "counts"), (tensor.cpu() for tensor in self._tensors()), strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues where a state was taken.

        Raises:
            ValueError: it is of another model or of other settings.
        """
        given = tuple(state["amax"].shape), tuple(state["counts"].shape)
        own = tuple(self.amax_LSG.shape), tuple(self.counts_LSHM.shape)
        if given != own:
            raise ValueError(
                f"Saved KV statistics have the shapes {given}, these {own}: resume with the same checkpoint and "
                "per_head, or start anew with --overwrite."
            )
        self.tokens = int(state["tokens"])
        self.amax_LSG.copy_(state["amax"])
        self.counts_LSHM.copy_(state["counts"])


class _Recorder:
    """Stands where attention expects its cache: sees what would be stored, and stores nothing."""

    def __init__(self, statistics: KVStatistics, counted_BT: Tensor) -> None:
        self.statistics, self.counted_BT = statistics, counted_BT

    def update(self, keys_BGTC: Tensor, values_BGTC: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        for kind, x_BGTC in enumerate((keys_BGTC, values_BGTC)):
            self.statistics.add(layer_idx, kind, x_BGTC.transpose(1, 2)[self.counted_BT])
        return keys_BGTC, values_BGTC


@contextmanager
def recording(model: PreTrainedModel, statistics: KVStatistics, counted_BT: Tensor) -> Iterator[None]:
    """Counts the keys and values of one forward pass, made inside and without a cache.

    Args:
        model: the causal language model inside any LoRA wrapper.
        statistics: what they are added to.
        counted_BT: the tokens of the batch that count.
    """
    recorder = _Recorder(statistics, counted_BT)

    def hand_over(_: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, keywords | {"past_key_values": recorder}

    hooks = [layer.self_attn.register_forward_pre_hook(hand_over, with_kwargs=True) for layer in model.model.layers]
    statistics.tokens += int(counted_BT.sum())
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def find_scales(
    statistics: KVStatistics, settings: ScaleSettings, windows: Sequence[Window], fingerprint: str
) -> KVScales:
    """The scales of a checkpoint.

    Args:
        statistics: over all processes.
        settings: how scales follow.
        windows: of each layer; None: full attention.
        fingerprint: of the checkpoint.

    Raises:
        ValueError: no token was counted, or an amax is zero or not finite (names the layer).
    """
    if statistics.tokens == 0:
        raise ValueError("No token was counted: the calibration data is empty. Give the data module some sequences.")
    found: list[Scales | None] = []
    for layer, window in enumerate(windows):
        if window is not None and settings.windowed_layers == "bf16":
            found.append(None)
        else:
            found.append((_scale(statistics, settings, layer, 0), _scale(statistics, settings, layer, 1)))
    layers = under(statistics, found)
    return KVScales(fingerprint, settings.method, settings.rounding, statistics.tokens, layers)


def under(statistics: KVStatistics, scales: Sequence[Scales | None]) -> tuple[LayerScales | None, ...]:
    """What given scales, of whatever origin, do to the counted keys and values."""
    layers: list[LayerScales | None] = []
    for layer, pair in enumerate(scales):
        if pair is None:
            layers.append(None)
        else:
            layers.append(LayerScales(*(_judged(statistics, layer, kind, pair[kind]) for kind in (0, 1))))
    return tuple(layers)


def _judged(statistics: KVStatistics, layer: int, kind: int, scale: Tensor) -> TensorScale:
    amax_G, counts_HM = statistics.amax_LSG[layer, kind], statistics.counts_LSHM[layer, kind]
    lost = sum(overflow(counts_M, one) for counts_M, one in zip(counts_HM, scale.reshape(-1), strict=True))
    return TensorScale(amax_G.max() if scale.ndim == 0 else amax_G, scale, lost)


def _scale(statistics: KVStatistics, settings: ScaleSettings, layer: int, kind: int) -> Tensor:
    """Of the keys or values of a layer: a scalar, or one for each head."""
    amax_G, counts_HM = statistics.amax_LSG[layer, kind], statistics.counts_LSHM[layer, kind]
    amax_H = amax_G if settings.per_head else amax_G.max()[None]
    try:
        check_positive(amax_H, f"amax of {'KV'[kind]} in layer {layer}")
    except ValueError as error:
        raise ValueError(
            f"{error}: no scale follows from it. Look for zeroed or broken weights in this layer's "
            f"{'kv'[kind]}_proj, or give more calibration data."
        ) from None
    scale_H = torch.stack([_of_set(counts_M, amax, settings) for counts_M, amax in zip(counts_HM, amax_H, strict=True)])
    return scale_H if settings.per_head else scale_H[0]


def _of_set(counts_M: Tensor, amax: Tensor, settings: ScaleSettings) -> Tensor:
    power_of_two = settings.rounding == "power_of_two"
    if settings.method == "mse":
        return least_error_scale(counts_M, amax, power_of_two)
    top = amax if settings.method == "amax" else percentile(counts_M, settings.percent)
    if top == 0:  # so many zeros that the percentage is reached with them alone
        top = amax
    return power_of_two_up(saturating_at(top)) if power_of_two else saturating_at(top)
