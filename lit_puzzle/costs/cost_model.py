"""The cost model: parameters, bytes, seconds and throughput of every block, and of a whole child, in a deployment.

Reads and writes nothing. Costs are additive: the model's totals are `rest` (embedding, last norm, head, the engine's
step) plus one `block` per layer, so that a linear program can choose the blocks. The KV cache alone is not: it depends
on how many layers have each window (`kv_demand`, `lit_puzzle.costs.kv_layout`), which the program has a table of.

    bytes per GPU        weights + KV cache of `batch` requests <= usable
    request seconds      batch x prefill + G x decode
    tokens per second    replicas x batch x G / request seconds

With continuous batching a replica keeps `batch` requests in flight, started at different times. During the G decode
steps of one request the replica also reads `batch` prompts, one for each slot: hence the formula for request seconds.
The contexts of the requests in flight spread evenly over P+1 .. P+G: hence the means over a request's decode steps, for
seconds and for bytes. Not modeled: a step that reads a prompt chunk beside decoding loads the weights once; here they
are counted twice.

Source: arXiv 2602.11937 (deployments, batch sizes swept) and arXiv 2411.19146 (costs summed over blocks).
Legend: P prompt tokens, G generated tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from lit_puzzle.costs.accounting import (
    layer_parameters,
    layer_weight_bytes,
    mean_context,
    mean_over_steps,
    rest_weight_bytes,
)
from lit_puzzle.costs.block_cost import BlockCost, Prediction
from lit_puzzle.costs.engine import GIB, ServingEngine
from lit_puzzle.costs.gpus import find_gpu
from lit_puzzle.costs.kv_layout import KVDemand, WindowCounts, vllm_demand, weighted_width, window_counts
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Block, Deployment, KernelTimes, Setting
from lit_puzzle.spec import KV_DTYPE_BYTES, Scenario


class DoesNotFitError(ValueError):
    """The model needs more memory than the GPUs have, in every deployment."""


class CostModel:
    """Costs of blocks and of whole models in one scenario.

    Args:
        model: sizes that all layers share.
        scenario: GPUs, tokens and number formats to predict costs for.
        times: source of kernel times.
        engine: settings of the serving engine.

    Raises:
        ValueError: the GPU is unknown, the scenario generates nothing, its parallelism does not divide the GPUs and
            the heads, or the source of times cannot answer for it.
    """

    def __init__(
        self, model: ModelShape, scenario: Scenario, times: KernelTimes, engine: ServingEngine | None = None
    ) -> None:
        self.model, self.scenario, self.times = model, scenario, times
        self.gpu = find_gpu(scenario.gpu)
        given = engine or ServingEngine()
        self.max_sequences = self.gpu.vllm.max_sequences if given.max_sequences is None else given.max_sequences
        self.engine = dataclasses.replace(given, max_sequences=self.max_sequences)
        if scenario.generated_tokens == 0:
            raise ValueError("the scenario generates 0 tokens: throughput counts generated tokens; set 1 or more")
        self._cached = scenario  # the steps over which bytes of KV cache are averaged
        if self.engine.kv.requests == "in_step":
            last = scenario.total_tokens - 1
            self._cached = dataclasses.replace(scenario, prompt_tokens=last, generated_tokens=1)
        self._static_costs: dict[tuple[Block, Deployment], BlockCost] = {}
        self._decode_cache: dict[tuple[Block, Deployment, int], float] = {}
        self._rest_costs: dict[tuple[Deployment, int], BlockCost] = {}
        self._kv_demands: dict[tuple[WindowCounts, Deployment], KVDemand] = {}
        self._settings = {chosen: Setting(model, scenario, chosen, self.engine) for chosen in self._deployments()}
        for setting in self._settings.values():
            times.check(setting)

    def deployments(self) -> list[Deployment]:
        """Return every deployment that the scenario allows, lowest tensor parallelism first."""
        return list(self._settings)

    def _deployments(self) -> list[Deployment]:
        scenario, model = self.scenario, self.model
        ranks = [scenario.tensor_parallel] if scenario.tensor_parallel else [2**power for power in range(20)]
        groups = scenario.expert_parallel or 1
        allowed = [
            Deployment(rank, groups, scenario.num_gpus // rank)
            for rank in ranks
            if scenario.num_gpus % rank == 0
            and rank % groups == 0
            and model.num_query_heads % rank == 0
            and (model.num_kv_heads % rank == 0 or rank % model.num_kv_heads == 0)
        ]
        if not allowed:
            raise ValueError(
                f"no tensor parallelism in {ranks[:6]} fits {scenario.num_gpus} GPUs, expert_parallel {groups}, "
                f"{model.num_query_heads} query heads and {model.num_kv_heads} key-value heads: it must divide the "
                "GPUs and the heads and be a multiple of expert_parallel"
            )
        return allowed

    def block(self, block: Block, deployment: Deployment, batch_size: int) -> BlockCost:
        """Return the cost of one layer.

        Raises:
            ValueError: the block has fewer experts than a token is routed to, or expert_parallel does not divide them.
        """
        seconds = self._decode_seconds(block, deployment, batch_size)
        return dataclasses.replace(self._static_cost(block, deployment), decode_seconds=seconds)

    def _decode_seconds(self, block: Block, deployment: Deployment, batch_size: int) -> float:
        key = (block, deployment, batch_size)
        if key not in self._decode_cache:
            setting, decode = self._settings[deployment], self.times.decode_layer
            self._check_block(block, deployment)
            self._decode_cache[key] = mean_over_steps(
                self.scenario, block.window_tokens, lambda context: decode(setting, block, batch_size, context)
            )
        return self._decode_cache[key]

    def _static_cost(self, block: Block, deployment: Deployment) -> BlockCost:
        """Return the part of a layer's cost that does not depend on the batch size: decode_seconds is 0."""
        key = (block, deployment)
        if key not in self._static_costs:
            self._check_block(block, deployment)
            model, scenario, setting = self.model, self.scenario, self._settings[deployment]
            kv_token_bytes, prompt = self.kv_token_bytes(deployment), scenario.prompt_tokens
            self._static_costs[key] = BlockCost(
                parameters=layer_parameters(model, block.num_experts, block.num_experts),
                active_parameters=layer_parameters(
                    model, block.num_experts, min(block.num_experts, model.experts_per_token)
                ),
                weight_bytes=layer_weight_bytes(setting, block.num_experts),
                kv_bytes=kv_token_bytes * mean_context(self._cached, block.window_tokens),
                prefill_seconds=self.times.prefill_layer(setting, block, prompt) if prompt else 0.0,
                decode_seconds=0.0,
            )
        return self._static_costs[key]

    def _check_block(self, block: Block, deployment: Deployment) -> None:
        if block.num_experts % deployment.expert_parallel:
            raise ValueError(
                f"a layer of {block.num_experts} experts cannot be split over {deployment.expert_parallel} groups of "
                "GPUs; keep a multiple of expert_parallel, or set expert_parallel to 1"
            )

    def rest(self, deployment: Deployment, batch_size: int) -> BlockCost:
        """Return the cost of everything outside the layers; it has no KV cache."""
        key = (deployment, batch_size)
        if key not in self._rest_costs:
            setting, prompt = self._settings[deployment], self.scenario.prompt_tokens
            table = self.model.vocab * self.model.hidden
            parameters = table * (1 if self.model.tied_embeddings else 2) + self.model.hidden
            self._rest_costs[key] = BlockCost(
                parameters=parameters,
                active_parameters=table + self.model.hidden,
                weight_bytes=rest_weight_bytes(setting),
                kv_bytes=0.0,
                prefill_seconds=self.times.prefill_rest(setting, prompt) if prompt else 0.0,
                decode_seconds=self.times.decode_rest(setting, batch_size),
            )
        return self._rest_costs[key]

    def kv_token_bytes(self, deployment: Deployment) -> int:
        """Return the bytes of one token's keys and values in one layer on each GPU."""
        heads = -(-self.model.num_kv_heads // deployment.tensor_parallel)  # where ranks outnumber heads: one on each
        return 2 * heads * self.model.head_dim * KV_DTYPE_BYTES[self.scenario.kv_dtype]

    def kv_demand(self, counts: WindowCounts, deployment: Deployment) -> KVDemand:
        """Return the bytes of KV cache on each GPU that layers with these windows take, as the engine allocates it."""
        key = (counts, deployment)
        if key not in self._kv_demands:
            token_bytes, kv, scenario = self.kv_token_bytes(deployment), self.engine.kv, self._cached
            if kv.allocator == "ideal":
                held = sum(count * mean_context(scenario, window) for window, count in counts)
                self._kv_demands[key] = KVDemand(token_bytes * held, 0.0)
            else:
                lengths = scenario.prompt_tokens, scenario.generated_tokens
                block = kv.block_tokens or self.gpu.vllm.kv_block_tokens
                in_flight, width = self.engine.chunk_tokens * kv.concurrent_batches, None
                if kv.allocator == "vllm_weighted":
                    width = weighted_width(counts, kv.context_tokens or scenario.total_tokens, block, in_flight)
                chunk = min(in_flight, self.scenario.prompt_tokens)
                self._kv_demands[key] = vllm_demand(counts, lengths, token_bytes, block, chunk, width)
        return self._kv_demands[key]

    def _demand_of(self, blocks: Iterable[Block], deployment: Deployment) -> KVDemand:
        return self.kv_demand(window_counts(block.window_tokens for block in blocks), deployment)

    def usable_bytes(self, deployment: Deployment) -> float:
        """Return the bytes of one GPU that weights and KV cache may use."""
        channels = self.model.num_query_heads * self.model.head_dim
        return self.engine.usable_bytes(self.gpu.memory_gib, channels, deployment.tensor_parallel)

    def predict(self, blocks: Sequence[Block], deployment: Deployment, batch_size: int) -> Prediction:
        """Return the costs of a model with these layers, whether it fits the memory or not."""
        total = self.rest(deployment, batch_size)
        for block, count in Counter(blocks).items():
            total += self.block(block, deployment, batch_size).times(count)
        request_seconds = self._request_seconds(total, batch_size)
        gpu_bytes = total.weight_bytes + self._demand_of(blocks, deployment).total(batch_size)
        return Prediction(
            tokens_per_second=deployment.replicas * batch_size * self.scenario.generated_tokens / request_seconds,
            latency_seconds=request_seconds,
            step_seconds=total.decode_seconds,
            memory_gib=gpu_bytes * self.scenario.num_gpus / GIB,
            fits=gpu_bytes <= self.usable_bytes(deployment),
            parameters=total.parameters,
            active_parameters=total.active_parameters,
            batch_size=batch_size,
            deployment=deployment,
        )

    def _request_seconds(self, total: BlockCost, batch_size: int) -> float:
        return batch_size * total.prefill_seconds + self.scenario.generated_tokens * total.decode_seconds

    def largest_batch(self, blocks: Sequence[Block], deployment: Deployment) -> int:
        """Return the number of requests that fit one replica, at most `max_sequences`; 0 when none does."""
        total = self._weights_and_cache(Counter(blocks), deployment)
        free = self.usable_bytes(deployment) - total.weight_bytes
        return min(self.max_sequences, self._demand_of(blocks, deployment).requests(free))

    def _weights_and_cache(self, counts: Counter[Block], deployment: Deployment) -> BlockCost:
        total = self.rest(deployment, 1)
        for block, count in counts.items():
            total += self._static_cost(block, deployment).times(count)
        return total

    def best(self, blocks: Sequence[Block]) -> Prediction:
        """Return the prediction of the fastest deployment and batch size among all that fit the memory.

        Every batch size from 1 to the largest that fits is tried, or only the scenario's own.

        Raises:
            DoesNotFitError: no deployment fits; the message says what the smallest one needs.
        """
        fixed = self.scenario.batch_size
        found: list[tuple[float, Deployment, int]] = []
        for deployment in self.deployments():
            largest = self.largest_batch(blocks, deployment)
            sizes = range(1, largest + 1) if fixed is None else [fixed] if fixed <= largest else []
            speeds = self._speeds(Counter(blocks), deployment, sizes)
            found += [(speed, deployment, size) for speed, size in zip(speeds, sizes, strict=True)]
        if found:
            _, deployment, size = max(found, key=lambda entry: entry[0])
            return self.predict(blocks, deployment, size)
        raise DoesNotFitError(self._too_large(blocks, fixed or 1))

    def _speeds(self, counts: Counter[Block], deployment: Deployment, sizes: Iterable[int]) -> list[float]:
        """Return requests a second for every batch size, as `predict` counts them."""
        prefill, generated = self._weights_and_cache(counts, deployment).prefill_seconds, self.scenario.generated_tokens
        speeds = []
        for size in sizes:
            decode = self.rest(deployment, size).decode_seconds
            decode += sum(count * self._decode_seconds(block, deployment, size) for block, count in counts.items())
            speeds.append(deployment.replicas * size / (size * prefill + generated * decode))
        return speeds

    def _too_large(self, blocks: Sequence[Block], batch_size: int) -> str:
        needs = [(self.predict(blocks, each, batch_size).memory_gib, each) for each in self.deployments()]
        memory_gib, deployment = min(needs, key=lambda entry: entry[0])
        gpus, usable_gib = self.scenario.num_gpus, self.usable_bytes(deployment) / GIB
        return (
            f"the model does not fit {gpus} x {self.scenario.gpu} with {batch_size} requests in flight: with "
            f"tensor_parallel {deployment.tensor_parallel} it needs {memory_gib / gpus:.1f} of {usable_gib:.1f} usable "
            "GiB per GPU; "
            "use more GPUs, fewer experts, shorter contexts, smaller batches or a smaller kv_dtype"
        )
