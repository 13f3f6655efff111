"""The dataclasses that stages exchange: a layer's block, a child's plan, a deployment scenario and its budget.

Every stage from importance to export uses these frozen dataclasses. Each has `to_json()` (plain dicts, lists, numbers)
and `from_json()` (strict: an unknown or missing key is a ValueError that names it). Loads in milliseconds: no torch.
Source: arXiv 2602.11937 for the search space, arXiv 2411.19146 for budgets under a deployment scenario.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_puzzle.run.files import parse_json, read_text, write_json
from lit_puzzle.run.strict_json import check_whole, checked_fields

KV_DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
# MXFP4: 32 values of 4 bits share one scale of 8 bits.
WEIGHT_BITS: dict[str, float] = {"mxfp4": 4.25, "fp8": 8.0, "bfloat16": 16.0, "float16": 16.0, "float32": 32.0}


@dataclass(frozen=True)
class BlockSpec:
    """The block of one layer of a child.

    Attributes:
        experts: indices of the kept experts of the parent's layer, ascending, without duplicates.
        window_tokens: sliding window of the attention in tokens; None is full attention.
    """

    experts: tuple[int, ...]
    window_tokens: int | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(self.experts))
        if not self.experts:
            raise ValueError("BlockSpec: experts is empty; a layer keeps at least one expert")
        for index in self.experts:
            check_whole("BlockSpec", "every expert index", index, 0)
        if any(left >= right for left, right in itertools.pairwise(self.experts)):
            raise ValueError(
                f"BlockSpec: experts must ascend without duplicates, got {list(self.experts)}; sort them first"
            )
        if self.window_tokens is not None:
            check_whole("BlockSpec", "window_tokens", self.window_tokens, 1)

    @property
    def num_experts(self) -> int:
        """Number of kept experts."""
        return len(self.experts)

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value, with lists instead of tuples."""
        return {"experts": list(self.experts), "window_tokens": self.window_tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BlockSpec:
        """Inverse of `to_json`.

        Raises:
            ValueError: a key is unknown or missing, or the values are not a block.
        """
        return cls(**checked_fields(cls, data))


@dataclass(frozen=True)
class Plan:
    """The plan of a child: one block for every layer of one parent.

    Attributes:
        parent_fingerprint: `lit_puzzle.model.checkpoint.fingerprint` of the parent, to which the indices refer.
        num_parent_experts: largest number of experts in any layer of the parent; every index is below it.
        blocks: one BlockSpec per layer, layer 0 first.
    """

    parent_fingerprint: str
    num_parent_experts: int
    blocks: tuple[BlockSpec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not isinstance(self.parent_fingerprint, str) or not self.parent_fingerprint:
            raise ValueError(f"Plan: parent_fingerprint must be a non-empty text, got {self.parent_fingerprint!r}")
        check_whole("Plan", "num_parent_experts", self.num_parent_experts, 1)
        if not self.blocks:
            raise ValueError("Plan: blocks is empty; it needs one block per layer of the parent")
        for layer, block in enumerate(self.blocks):
            if block.experts[-1] >= self.num_parent_experts:
                raise ValueError(
                    f"Plan: layer {layer} keeps expert {block.experts[-1]}, but the parent has "
                    f"{self.num_parent_experts} experts (indices 0..{self.num_parent_experts - 1})"
                )

    @property
    def num_layers(self) -> int:
        """Number of layers, the same in parent and child."""
        return len(self.blocks)

    def block_configs(self) -> list[dict[str, int | None]]:
        """Return the `block_configs` of the child's configuration: number of experts and window of every layer."""
        return [
            {"num_local_experts": block.num_experts, "sliding_window": block.window_tokens} for block in self.blocks
        ]

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {
            "parent_fingerprint": self.parent_fingerprint,
            "num_parent_experts": self.num_parent_experts,
            "blocks": [block.to_json() for block in self.blocks],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`.

        Raises:
            ValueError: a key is unknown or missing, or the blocks are not a plan.
        """
        values = checked_fields(cls, data)
        if not isinstance(values["blocks"], list | tuple):
            raise ValueError(f"Plan: blocks must be a list of layers, got {type(values['blocks']).__name__}")
        values["blocks"] = tuple(BlockSpec.from_json(block) for block in values["blocks"])
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write as a JSON file, atomically (temporary file, fsync, rename)."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan.json, see `read_plan`."""
        return read_plan(path)[0]


def read_plan(path: Path) -> tuple[Plan, Mapping[str, Any]]:
    """Read a JSON file that is a plan, or whose key `plan` is one, as a search writes it.

    Returns:
        The plan, and the record of the search around it (costs, scores, trained blocks); empty for a bare plan.

    Raises:
        ValueError: the file is missing, not JSON, or no plan.
    """
    if not path.is_file():
        raise ValueError(f"no plan at {path}; make one with recipes/search.yaml or name an existing plan.json")
    data = parse_json(read_text(path), str(path))
    record = data if isinstance(data, Mapping) and isinstance(data.get("plan"), Mapping) else {}
    try:
        return Plan.from_json(record.get("plan", data)), record
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Scenario:
    """A deployment for which costs are computed.

    Attributes:
        gpu: name of the device, a key of the cost model's device table (`H100`, `H200`, `B200`, ...).
        num_gpus: GPUs of the deployment.
        prompt_tokens: tokens read per request.
        generated_tokens: tokens generated per request.
        batch_size: concurrent requests of one replica of the model; None lets the cost model take the best that fits.
        kv_dtype: number format of the KV cache: float32, bfloat16, float16 or fp8.
        tensor_parallel: ranks that share one layer's matrices; None lets the cost model choose.
        expert_parallel: ranks, among those of tensor parallelism, that each hold whole experts; None means 1: every
            expert is split over all of them.
        weight_dtype: number format of everything but the experts' matrices: a key of `WEIGHT_BITS`.
        expert_dtype: number format of the experts' matrices: a key of `WEIGHT_BITS`.
    """

    gpu: str
    num_gpus: int
    prompt_tokens: int
    generated_tokens: int
    batch_size: int | None = None
    kv_dtype: str = "fp8"
    tensor_parallel: int | None = None
    expert_parallel: int | None = None
    weight_dtype: str = "bfloat16"
    expert_dtype: str = "mxfp4"

    def __post_init__(self) -> None:
        if not isinstance(self.gpu, str) or not self.gpu:
            raise ValueError(f"Scenario: gpu must be the name of a device, got {self.gpu!r}")
        check_whole("Scenario", "num_gpus", self.num_gpus, 1)
        check_whole("Scenario", "prompt_tokens", self.prompt_tokens, 0)
        check_whole("Scenario", "generated_tokens", self.generated_tokens, 0)
        shares = {"tensor_parallel": self.tensor_parallel, "expert_parallel": self.expert_parallel}
        for name, value in {"batch_size": self.batch_size, **shares}.items():
            if value is not None:
                check_whole("Scenario", name, value, 1)
        if self.prompt_tokens + self.generated_tokens == 0:
            raise ValueError("Scenario: prompt_tokens and generated_tokens are both 0; at least one must be positive")
        if self.kv_dtype not in KV_DTYPE_BYTES:
            raise ValueError(f"Scenario: unknown kv_dtype {self.kv_dtype!r}; allowed: {sorted(KV_DTYPE_BYTES)}")
        for name, dtype in {"weight_dtype": self.weight_dtype, "expert_dtype": self.expert_dtype}.items():
            if dtype not in WEIGHT_BITS:
                raise ValueError(f"Scenario: unknown {name} {dtype!r}; allowed: {sorted(WEIGHT_BITS)}")

    @property
    def total_tokens(self) -> int:
        """Tokens in the cache when a request ends."""
        return self.prompt_tokens + self.generated_tokens

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scenario:
        """Inverse of `to_json`.

        Raises:
            ValueError: a key is unknown or missing, or the values are not a deployment.
        """
        return cls(**checked_fields(cls, data))


@dataclass(frozen=True)
class Budget:
    """Bounds on the costs of a child; None is no bound.

    Attributes:
        memory_gib: at most this much memory for weights and KV cache over all GPUs of the scenario.
        throughput_tokens_per_second: at least this many generated tokens a second.
        throughput_over_parent: at least this many times the parent's own best throughput in the scenario.
        requests_over_parent: at least this many times the parent's requests a second: throughput / answer length.
        latency_seconds: at most this long for one request.
        total_parameters: at most this many parameters.
        active_parameters: at most this many parameters used per token.
        full_attention_layers: at most this many layers without a window.
    """

    memory_gib: float | None = None
    throughput_tokens_per_second: float | None = None
    throughput_over_parent: float | None = None
    requests_over_parent: float | None = None
    latency_seconds: float | None = None
    total_parameters: int | None = None
    active_parameters: int | None = None
    full_attention_layers: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.to_json().items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"Budget: {name} must be a finite number or null, got {value!r}")
            if value < 0 or (value == 0 and name != "full_attention_layers"):
                raise ValueError(f"Budget: {name} must be positive, got {value!r}; null leaves it unbounded")

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Budget:
        """Inverse of `to_json`.

        Raises:
            ValueError: a key is unknown, or a value cannot be a bound.
        """
        return cls(**checked_fields(cls, data))


@dataclass(frozen=True)
class Target:
    """A deployment and the bounds that a child must meet in it.

    Attributes:
        scenario: the deployment.
        budget: the bounds.
        efforts: share of requests at each reasoning effort, for `requests_over_parent`; None: equal shares.
    """

    scenario: Scenario
    budget: Budget
    efforts: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        own = {} if self.efforts is None else {"efforts": dict(self.efforts)}
        return {"scenario": self.scenario.to_json(), "budget": self.budget.to_json()} | own

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Target:
        """Inverse of `to_json`.

        Raises:
            ValueError: a key is unknown or missing, or the values are not a deployment and its bounds.
        """
        values = checked_fields(cls, data)
        scenario, budget = Scenario.from_json(values.pop("scenario")), Budget.from_json(values.pop("budget"))
        return cls(scenario, budget, **values)
