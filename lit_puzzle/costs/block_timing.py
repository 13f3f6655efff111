"""Times real decoder layers of one model shape: decode steps over a filled KV cache, prompts, and what is no layer.

Weights must come from memory, as in a model, not from the processor's cache: a layer is run as `copies` layers of
different weights one after the other, its time divided by them, and decode steps take turns with 8 sets of tokens, so
that each goes to other experts. Weights and hidden states are random: tokens go to all experts about alike; a trained
router sends more of them to fewer experts.

Reads and writes nothing. Memory: `copies` layers of every expert count, and for one point at a time its cache:
copies * batch * 2 * KV heads * head_dim * min(window, context) values, once more while a step appends to it.
Source: arXiv 2411.19146 (measured runtimes per block); transformers' gpt-oss layers and caches are what is timed.

Shapes: B batch, T tokens, E embedding channels, H KV heads, C channels of a head.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRotaryEmbedding

import lit_puzzle.model.sink_attention  # noqa: F401  (registers itself with transformers)
from lit_puzzle.costs.interleaved_timer import Work, interleaved
from lit_puzzle.costs.serving import Block, parent_blocks
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM

DECODE_INPUTS = 8  # sets of tokens
REPLACED = {"model_type", "architectures", "layer_types", "block_configs", "num_hidden_layers", "auto_map"} | {
    "quantization_config",  # blocks are timed in one plain dtype
    "transformers_version",
    "dtype",
    "torch_dtype",
}  # keys of config.json that the timed model does not take over

Row = dict[str, int | float | None]
Case = tuple[str, Row, Callable[[], Work]]


@dataclass(frozen=True)
class Machine:
    """Where and how layers are run.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: Of weights, hidden states and cache.
        attention: Attention implementation.
        experts: Experts implementation.
        copies: Layers of different weights run one after the other.
        rounds: Measurements of every point.
    """

    device: str
    dtype: torch.dtype
    attention: str = "eager"
    experts: str = "grouped_mm"
    copies: int = 4
    rounds: int = 7

    def random(self, *shape: int) -> Tensor:
        """Normal random numbers of this machine's dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Points:
    """What is measured: every combination, windows only with contexts below them and at them."""

    experts: Sequence[int]
    windows: Sequence[int | None]
    batches: Sequence[int]
    contexts: Sequence[int]
    prompts: Sequence[int]

    def __post_init__(self) -> None:
        """Checks the numbers."""
        least = {"experts": 1, "batches": 1, "contexts": 2, "prompts": 1}
        given = {"experts": self.experts, "batches": self.batches, "contexts": self.contexts, "prompts": self.prompts}
        for name, values in given.items():
            if not values or min(values) < least[name]:
                raise ValueError(f"{name} must be numbers of at least {least[name]}, got {list(values)}.")
        if not self.windows or min(2 if window is None else window for window in self.windows) < 2:
            raise ValueError(f"windows must be numbers of at least 2, or none; got {list(self.windows)}.")

    def contexts_of(self, window: int | None) -> list[int]:
        """Contexts to measure; a step costs the same at all contexts from the window on."""
        if window is None:
            return sorted(set(self.contexts))
        return sorted({min(context, window) for context in [*self.contexts, window]})


class Skip(nn.Module):
    """Stands where a decoder layer would and does nothing."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The hidden states as they came."""
        return hidden_states


@dataclass
class Bench:
    """The layers of one model shape on one machine; methods prepare what is then timed.

    Attributes:
        config: The plain dict of a `config.json`.
        machine: Where they run.
    """

    config: Mapping[str, Any]
    machine: Machine
    _layers: dict[int, list[GptOssDecoderLayer]] = field(default_factory=dict)
    _models: dict[bool, GptOssPuzzleForCausalLM] = field(default_factory=dict)

    def decode_layer(self, block: Block, batch_size: int, context_tokens: int) -> Work:
        """One token per sequence, itself the last of `context_tokens`, through the copies of a layer."""
        config = puzzle_config(self.config, [block] * self.machine.copies, self.machine)
        cache = filled_cache(config, batch_size, context_tokens - 1, self.machine)
        inputs = [self.machine.random(batch_size, 1, config.hidden_size) for _ in range(DECODE_INPUTS)]
        return self._through_layers(config, block, inputs, cache)

    def prefill_layer(self, block: Block, prompt_tokens: int) -> Work:
        """One prompt through the copies of a layer, its keys and values written to a new cache."""
        config = puzzle_config(self.config, [block] * self.machine.copies, self.machine)
        inputs = [self.machine.random(1, prompt_tokens, config.hidden_size)]
        return self._through_layers(config, block, inputs, DynamicCache(config=config))

    def decode_model(self, batch_size: int, context_tokens: int, with_layers: bool) -> Work:
        """A decode step of the model of `config`, or of what is left of it without layers, to the next token."""
        model = self._model(with_layers)
        cache = filled_cache(model.config, batch_size, context_tokens - 1, self.machine)
        return self._through_model(model, [self._tokens(batch_size, 1) for _ in range(DECODE_INPUTS)], cache)

    def prefill_rest(self, prompt_tokens: int) -> Work:
        """One prompt through what is left of the model without layers."""
        model = self._model(with_layers=False)
        return self._through_model(model, [self._tokens(1, prompt_tokens)], DynamicCache(config=model.config))

    def _tokens(self, batch_size: int, tokens: int) -> Tensor:
        return torch.randint(self.config["vocab_size"], (batch_size, tokens), device=self.machine.device)

    def _through_layers(
        self, config: GptOssPuzzleConfig, block: Block, inputs: Sequence[Tensor], cache: DynamicCache
    ) -> Work:
        """Hidden states (B, T, E), one of `inputs` after the other, through the copies of a layer."""
        hidden_BTE, turns = inputs[0], cycle(inputs)
        seen = cache.get_seq_length()
        places_1T = (torch.arange(hidden_BTE.shape[1], device=hidden_BTE.device) + seen)[None]
        rotation = GptOssRotaryEmbedding(config=config).to(hidden_BTE.device)(hidden_BTE, places_1T)
        create = create_causal_mask if block.window_tokens is None else create_sliding_window_causal_mask
        mask = create(config.per_layer_config[0], hidden_BTE, None, cache, places_1T, layer_idx=0)
        layers = self._copies(config, block)

        def work() -> Tensor:
            out_BTE, used = next(turns), same_cache(cache)
            for layer in layers:
                out_BTE = layer(
                    out_BTE,
                    attention_mask=mask,
                    position_ids=places_1T,
                    position_embeddings=rotation,
                    past_key_values=used,
                    use_cache=True,
                )
            return out_BTE

        return work

    def _through_model(self, model: GptOssPuzzleForCausalLM, inputs: Sequence[Tensor], cache: DynamicCache) -> Work:
        """Tokens (B, T), one of `inputs` after the other, to the next token (B)."""
        (batch_size, tokens), turns = inputs[0].shape, cycle(inputs)
        mask_BT = torch.ones(batch_size, cache.get_seq_length() + tokens, dtype=torch.long, device=model.device)

        def work() -> Tensor:
            output = model(
                input_ids=next(turns),
                attention_mask=mask_BT,
                past_key_values=same_cache(cache),
                use_cache=True,
                logits_to_keep=1,
            )
            next_B: Tensor = output.logits[:, -1].argmax(-1)
            return next_B

        return work

    def _copies(self, config: GptOssPuzzleConfig, block: Block) -> list[GptOssDecoderLayer]:
        """The layers of that many experts, set to the block's window: weights do not depend on it."""
        if block.num_experts not in self._layers:
            self._layers[block.num_experts] = [self._layer(config, index) for index in range(self.machine.copies)]
        for layer in self._layers[block.num_experts]:
            layer.self_attn.sliding_window = block.window_tokens
        return self._layers[block.num_experts]

    def _layer(self, config: GptOssPuzzleConfig, index: int) -> GptOssDecoderLayer:
        with torch.device(self.machine.device):
            layer = GptOssDecoderLayer(config.get_gpt_oss_config_for_layer(index), index)
        layer = layer.to(self.machine.dtype).eval()
        for name, parameter in layer.named_parameters():
            if "norm" in name:  # small norms would leave the routing to the router's bias: the same for all tokens
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.0 if "bias" in name else 0.02)
        layer.self_attn.config = layer.mlp.experts.config = config
        return layer

    def _model(self, with_layers: bool) -> GptOssPuzzleForCausalLM:
        if with_layers not in self._models:
            blocks = list(parent_blocks(self.config))
            if not with_layers:  # one stand-in for every window, so that all masks are made
                blocks = [Block(1, window) for window in dict.fromkeys(block.window_tokens for block in blocks)]
            with torch.device(self.machine.device):
                model = GptOssPuzzleForCausalLM(puzzle_config(self.config, blocks, self.machine))
            if not with_layers:
                model.model.layers = nn.ModuleList(Skip() for _ in blocks)
            self._models[with_layers] = model.to(self.machine.dtype).eval()
        return self._models[with_layers]


def puzzle_config(config: Mapping[str, Any], blocks: Sequence[Block], machine: Machine) -> GptOssPuzzleConfig:
    """The configuration of a model of this shape with these layers."""
    kept = {name: value for name, value in config.items() if name not in REPLACED}
    return GptOssPuzzleConfig(
        **kept,
        num_hidden_layers=len(blocks),
        block_configs=[
            {"num_local_experts": block.num_experts, "sliding_window": block.window_tokens} for block in blocks
        ],
        attn_implementation=machine.attention,
        experts_implementation=machine.experts,
    )


def filled_cache(config: GptOssPuzzleConfig, batch_size: int, tokens: int, machine: Machine) -> DynamicCache:
    """A cache as `tokens` tokens leave it, of random numbers."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        held = tokens
        if isinstance(layer, DynamicSlidingWindowLayer):
            held = min(tokens, layer.sliding_window - 1)
        shape = (batch_size, config.num_key_value_heads, held, config.head_dim)
        cache.update(machine.random(*shape), machine.random(*shape), index)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tokens
    return cache


def same_cache(cache: DynamicCache) -> DynamicCache:
    """A cache of the same tensors: a step appends to it by making new ones and leaves the original as it is."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


@torch.inference_mode()
def measure(bench: Bench, points: Points, whole_model: bool) -> dict[str, list[Row]]:
    """All rows of a table of timed blocks, by kind; `whole_model` has steps of the model of the configuration."""
    cases = [*_layer_cases(bench, points), *_rest_cases(bench, points, whole_model)]
    seconds = interleaved([prepare for _, _, prepare in cases], bench.machine.device, bench.machine.rounds)
    rows: dict[str, list[Row]] = {"whole_model": []}
    for (kind, row, _), taken in zip(cases, seconds, strict=True):
        share = bench.machine.copies if kind.endswith("layer") else 1
        rows.setdefault(kind, []).append({**row, "seconds": taken / share})
    return rows


def _layer_cases(bench: Bench, points: Points) -> Iterator[Case]:
    """Kind, row and preparation of everything measured of layers."""
    for window, experts in product(points.windows, points.experts):
        block = Block(experts, window)
        of_layer: Row = {"window_tokens": window, "num_experts": experts}
        for batch, context in product(points.batches, points.contexts_of(window)):
            row: Row = {**of_layer, "batch_size": batch, "context_tokens": context}
            yield "decode_layer", row, partial(bench.decode_layer, block, batch, context)
        for prompt in points.prompts:
            yield "prefill_layer", {**of_layer, "prompt_tokens": prompt}, partial(bench.prefill_layer, block, prompt)


def _rest_cases(bench: Bench, points: Points, whole_model: bool) -> Iterator[Case]:
    """The same of what is no layer, at the middle context (it enters through the masks), and of the whole model."""
    middle = sorted(points.contexts)[len(points.contexts) // 2]
    for batch in points.batches:
        yield "decode_rest", {"batch_size": batch}, partial(bench.decode_model, batch, middle, with_layers=False)
        for context in points.contexts if whole_model else ():
            row: Row = {"batch_size": batch, "context_tokens": context}
            yield "whole_model", row, partial(bench.decode_model, batch, context, with_layers=True)
    for prompt in points.prompts:
        yield "prefill_rest", {"prompt_tokens": prompt}, partial(bench.prefill_rest, prompt)
