"""The time of experts and products: measured tables, and the scaling laws that extrapolate beyond the measured sizes.

Reads through `lit_puzzle.costs.kernel_tables`. Where no law is stated, a size outside the measured range is a
ValueError.

    experts             decode is bound by reading the distinct experts that its tokens are routed to. Between two
                        measured expert counts: linear in distinct experts, E (1 - (1 - k / E)^n). Below the smallest
                        count, E0: the time of E0 experts for the number of tokens n0 that has equally many distinct
                        experts, plus the arithmetic of the other n - n0 tokens at the slope of the two longest measured
                        batches; at most the time of E0 experts for the same n tokens.
    products            a matrix wider than the widest measured one (the head): linear in its width. Narrower than the
                        narrowest: the time of the narrowest, because a tile is never smaller.

Legend: n tokens, E experts of a layer, k experts per token.
Source: the laws count arithmetic and memory traffic; the tables are those of aiconfigurator-core 0.12.0.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass, field

from lit_puzzle.costs.accounting import distinct_experts
from lit_puzzle.costs.kernel_tables import Curve, System, measured_dtype, mix, neighbors, read_rows
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Deployment

WEIGHT_DTYPES = {"bfloat16": "bfloat16", "fp8": "fp8"}
EXPERT_DTYPES = {"mxfp4": "w4a16_mxfp4", "bfloat16": "bfloat16", "fp8": "fp8"}
MXFP8_INPUTS = "w4a8_mxfp4_mxfp8"


@dataclass(frozen=True)
class Experts:
    """Seconds of top-k routing and experts on one rank, by number of experts and tokens."""

    experts_per_token: int
    counts: dict[int, Curve]

    @classmethod
    def load(
        cls, system: System, model: ModelShape, deployment: Deployment, dtypes: tuple[str, str], distribution: str
    ) -> Experts:
        """Read the rows of this model's experts, split as the deployment says, for one distribution of the routing.

        Args:
            system: where the tables are.
            model: sizes of the model.
            deployment: how the GPUs share it.
            dtypes: number formats of the experts and of their inputs.
            distribution: how tokens are spread over experts.
        """
        (expert_dtype, inputs), groups = dtypes, deployment.expert_parallel
        path, kernel = (
            f"{system.folder}/moe/vllm/{system.vllm}",
            measured_dtype(EXPERT_DTYPES, "expert_dtype", expert_dtype),
        )
        if inputs == "mxfp8":
            if system.mxfp8_experts is None or expert_dtype != "mxfp4":
                raise ValueError(
                    f"no measured kernels of {expert_dtype} experts with expert_inputs: mxfp8 in {system.folder}; it "
                    "needs MXFP4 experts on a B200. Set expert_inputs: bfloat16"
                )
            path, kernel = f"{system.folder}/moe/{system.mxfp8_experts}", MXFP8_INPUTS
        path += "/moe_perf.parquet"
        filters = (
            ("hidden_size", "=", model.hidden),
            ("inter_size", "=", model.intermediate),
            ("topk", "=", model.experts_per_token),
            ("moe_tp_size", "=", deployment.tensor_parallel // groups),
            ("moe_ep_size", "=", groups),
            ("moe_dtype", "=", kernel),
            ("distribution", "=", distribution),
        )
        counts: dict[int, dict[float, float]] = defaultdict(dict)
        for experts, tokens, latency in read_rows(path, ("num_experts", "num_tokens"), filters):
            counts[experts][tokens] = latency
        if not counts:
            raise ValueError(f"{path} has no rows with {' and '.join(f'{a} {b}' for a, _, b in filters)}")
        curves = {experts: Curve.of(path, "tokens", points) for experts, points in sorted(counts.items())}
        return cls(model.experts_per_token, curves)

    def at(self, num_experts: int, tokens: float) -> float:
        """Return the seconds of `tokens` tokens through a layer of `num_experts`.

        Raises:
            ValueError: there are more experts, or more tokens, than were measured.
        """
        measured = list(self.counts)
        if num_experts > measured[-1]:
            table = self.counts[measured[-1]].table
            raise ValueError(f"{table}: {num_experts} experts; measured are {measured}, fewer are extrapolated")
        if num_experts in self.counts:
            return self.counts[num_experts].at(tokens)
        if num_experts < measured[0]:
            return self._fewer(num_experts, measured[0], tokens)
        (low, _), (high, _) = neighbors(measured, num_experts)
        # A single token has k distinct experts whatever the count: the limit of the ratio is taken just above 1 token.
        distinct = [
            distinct_experts(count, self.experts_per_token, max(tokens, 1.01)) for count in (low, num_experts, high)
        ]
        share = (distinct[1] - distinct[0]) / (distinct[2] - distinct[0])
        return (1 - share) * self.counts[int(low)].at(tokens) + share * self.counts[int(high)].at(tokens)

    def _fewer(self, num_experts: int, smallest: int, tokens: float) -> float:
        curve, per_token = self.counts[smallest], self.experts_per_token
        distinct = distinct_experts(num_experts, per_token, tokens)
        equivalent = max(1.0, math.log1p(-distinct / smallest) / math.log1p(-per_token / smallest))
        return min(curve.at(tokens), curve.at(equivalent) + curve.last_slope() * (tokens - equivalent))


@dataclass(frozen=True)
class Products:
    """Seconds of the product of a matrix [out, in] with any number of tokens.

    Attributes:
        table: the table that the points are from, for error messages.
        measured: seconds by tokens for every measured matrix.
        curves: the same for every matrix asked for so far.
    """

    table: str
    measured: dict[tuple[int, int], Curve]
    curves: dict[tuple[int, int], Curve] = field(default_factory=dict)

    def at(self, out: float, inside: float, tokens: float) -> float:
        """Return the seconds of `tokens` rows times a matrix [out, inside].

        Raises:
            ValueError: the matrix is deeper, or the rows are more, than any that was measured.
        """
        key = (math.ceil(out), math.ceil(inside))
        if key not in self.curves:
            self.curves[key] = self._curve(*key)
        return self.curves[key].at(tokens)

    def _curve(self, out: int, inside: int) -> Curve:
        outs, insides = (sorted({shape[axis] for shape in self.measured}) for axis in (0, 1))
        if not insides[0] <= inside <= insides[-1]:
            raise ValueError(f"{self.table}: {inside} columns; measured {insides[0]}..{insides[-1]}")
        clamped = min(max(out, outs[0]), outs[-1])
        parts = []
        for wide, wide_weight in neighbors(outs, clamped):
            for deep, deep_weight in neighbors(insides, inside):
                if (int(wide), int(deep)) not in self.measured:
                    raise ValueError(f"{self.table}: a matrix of {wide:g} x {deep:g} was not measured")
                weight = wide_weight * deep_weight * max(1.0, out / outs[-1])
                parts.append((weight, self.measured[int(wide), int(deep)]))
        return mix(parts)


@functools.cache
def load_products(system: System, weight_dtype: str) -> Products:
    """Read all measured matrices of one number format, once per process.

    Raises:
        ValueError: none was measured.
    """
    path = f"{system.folder}/gemm/vllm/{system.vllm}/gemm_perf.parquet"
    dtype = measured_dtype(WEIGHT_DTYPES, "weight_dtype", weight_dtype)
    points: dict[tuple[int, int], dict[float, float]] = defaultdict(dict)
    for out, inside, tokens, latency in read_rows(path, ("n", "k", "m"), (("gemm_dtype", "=", dtype),)):
        points[out, inside][tokens] = latency
    if not points:
        raise ValueError(f"{path} has no products with weights in {dtype}; choose bfloat16")
    return Products(path, {shape: Curve.of(path, "tokens", curve) for shape, curve in points.items()})
