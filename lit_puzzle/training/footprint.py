"""Bytes of what trains: master weights, gradients, optimizer states, and layers gathered from other processes.

Formulas, for P parameters of b bytes, T of them trained, L layers, N processes:

    weights (P - T) b / N        master weights 4 T / N        gradients 4 T / N        AdamW 8 T / N
    gathered, N > 1              two layers, and embedding with head while the model runs (FSDP2's root group)

Pure functions; imports no torch; reads and writes nothing. Source: PyTorch FSDP2, arXiv 2304.11277.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from lit_puzzle.model.family import family_of
from lit_puzzle.model.footprint import BYTES, ModelSize
from lit_puzzle.model.layout import layer_shapes, tensor_shapes
from lit_puzzle.run.footprint import Device
from lit_puzzle.run.recipe_values import Values

OPTIMIZER_BYTES = {"SGD": 0, "RMSprop": 4, "Adagrad": 4, "Lion": 4}  # of a trained number; all others: two moments


@dataclass(frozen=True)
class Trained:
    """A model as it trains.

    Attributes:
        size: the model.
        width: bytes of a frozen number.
        layers: trained numbers inside the layers.
        ends: trained numbers of embedding, last norm and head.
        added: those of them that are no part of the model (adapters).
        optimizer: bytes of optimizer state of a trained number.
    """

    size: ModelSize
    width: int
    layers: int
    ends: int
    added: int
    optimizer: int

    @property
    def numbers(self) -> int:
        """All numbers that train."""
        return self.layers + self.ends

    @property
    def frozen(self) -> int:
        """Parameters of the model that do not train."""
        return self.size.parameters + self.added - self.numbers

    def states(self, processes: int) -> dict[str, float]:
        """Return what every process keeps all through training."""
        return {
            "weights": self.frozen * self.width / processes,
            "trained, in float32": 4 * self.numbers / processes,
            "gradients": 4 * self.numbers / processes,
            "optimizer": self.optimizer * self.numbers / processes,
        }

    @property
    def layer_bytes(self) -> float:
        """Bytes of the largest layer when it is gathered."""
        each = self.layers / len(self.size.layers)
        return (self.size.largest_layer - each * (self.added == 0)) * self.width + 4 * each

    @property
    def ends_bytes(self) -> float:
        """Bytes of embedding, last norm and head when they are gathered."""
        return self.ends * 4 + (self.size.ends - self.ends) * self.width

    @property
    def all_bytes(self) -> float:
        """Bytes of the whole model when it is gathered."""
        return self.frozen * self.width + 4 * self.numbers

    def gathered(self, processes: int, backward: bool) -> dict[str, float]:
        """Return what is gathered while the model runs: nothing in a single process."""
        if processes == 1:
            return {}
        gradients = {"their gradients": 4.0 * self.ends + 4.0 * self.layers / len(self.size.layers)} if backward else {}
        return {"gathered layers": 2 * self.layer_bytes, "gathered embedding and head": self.ends_bytes} | gradients

    def step_traffic(self, processes: int, passes: float = 2) -> float:
        """Return the bytes that a process receives in one forward and backward pass."""
        share = (processes - 1) / processes
        return share * (passes * self.all_bytes + 4 * self.numbers)


def trained(size: ModelSize, training: Values, optimizer: str) -> Trained:
    """Return what of a model trains.

    Args:
        size: the model.
        training: values of `lit_puzzle.training.settings.TrainingSettings`.
        optimizer: class path of the optimizer.
    """
    state = OPTIMIZER_BYTES.get(optimizer.rpartition(".")[2], 8)
    width = BYTES[str(training.at("dtype"))]
    lora = training.get("lora")
    if lora is not None:
        count = _adapter_numbers(size, training.inside("lora"))
        return Trained(size, width, count, 0, count, state)
    shapes = tensor_shapes(size.config)
    names, part = family_of(size.config).layer, training.get("trainable")
    patterns = names.parts[str(part)] if part else training.get("freeze") or names.frozen
    matched = {name for name in shapes if any(fnmatchcase(name, pattern) for pattern in patterns)}
    free = {name: prod(shape) for name, shape in shapes.items() if (name in matched) == bool(part)}
    layers = sum(count for name, count in free.items() if ".layers." in name)
    return Trained(size, width, layers, sum(free.values()) - layers, 0, state)


def _adapter_numbers(size: ModelSize, lora: Values) -> int:
    """Return the numbers of low-rank adapters: rank x (rows + columns) of every target, for each of its experts."""
    rank, targets = lora.whole("rank"), [*lora.at("target_modules"), *lora.at("target_parameters")]
    total = 0
    for layer in size.layers:
        shapes = layer_shapes(size.config, layer.experts, mxfp4=False)
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            is_target = any(module == t or module.endswith(f".{t}") or name.endswith(f".{t}") for t in targets)
            if len(shape) > 1 and is_target:
                total += rank * sum(shape[-2:]) * (shape[0] if len(shape) == 3 else 1)
    return total + rank * (size.vocab + size.hidden) * sum(t in ("lm_head", "embed_tokens") for t in targets)


def frozen_states(size: ModelSize, width: int, processes: int) -> dict[str, float]:
    """Return what a process keeps of a model that does not train."""
    return {"weights": size.parameters * width / processes}


def frozen_gathered(size: ModelSize, width: int, processes: int, root: bool = True) -> dict[str, float]:
    """Return what is gathered of a model that does not train; without a root, embedding and head are whole anyway."""
    if processes == 1:
        return {}
    ends = {"gathered embedding and head": float(size.ends * width)} if root else {}
    return {"gathered layers": 2.0 * size.largest_layer * width} | ends


def layer_by_layer(
    size: ModelSize, width: int, device: Device, at_work: Mapping[str, float], states: float, root: bool = True
) -> dict[str, float]:
    """Return what a forward pass holds that gathers a layer at a time: two layers and the one at work.

    On CPUs gloo copies what it gathers once more, when no layer is at work: that may be the fuller moment.

    Args:
        size: the model, which does not train.
        width: bytes of a number of its weights.
        device: of a process.
        at_work: what the layer at work holds.
        states: bytes of the states between two layers.
        root: whether embedding and head are gathered too; else they are whole anyway.
    """
    gathered = frozen_gathered(size, width, device.count, root)
    layer = float(size.largest_layer * width)
    if device.kind == "cpu" and device.count > 1 and layer + states > sum(at_work.values()):
        return gathered | {"a layer as gloo receives it": layer, "states": states}
    return gathered | dict(at_work)


def load_bytes(size: ModelSize, width: int, processes: int) -> dict[str, float]:
    """Return what loading holds: the share, one layer, and what is outside the experts until it is sharded."""
    if processes == 1:
        return {"weights": float(size.parameters * width)}
    outside = size.parameters - size.expert_parameters
    return {
        "weights": size.parameters * width / processes,
        "one layer while it is read": float(size.largest_layer * width),
        "embedding, head and attention until they are shared": float(outside * width),
    }
