"""Times of real decoder layers of one model shape: decode steps over a filled KV cache, prompts, and all outside them.

Weights must be read from memory, as in a model, and not from the processor's cache: a layer is run as `copies` layers
of different weights in a row, and the time is divided by `copies`; decode steps alternate between 8 sets of tokens,
which are routed to other experts. Weights and hidden states are random, so all experts receive about equally many
tokens; a trained router sends more of them to fewer experts.

Reads and writes nothing. Memory: `copies` layers of every expert count, and for one point at a time its cache:
copies * batch * 2 * KV heads * head_dim * min(window, context) values, twice that while a step appends to it.
Source: arXiv 2411.19146 (measured runtimes per block); the timed layers and caches are those of transformers.

Shapes: B batch, T tokens, E embedding channels, H KV heads, C channels of a head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import lit_puzzle.model.sink_attention  # noqa: F401  (registers itself with transformers)
from lit_puzzle.costs.filled_cache import filled_cache, same_cache
from lit_puzzle.costs.interleaved_timer import Work, interleaved
from lit_puzzle.costs.machine import Machine, Points
from lit_puzzle.costs.serving import Block, parent_blocks
from lit_puzzle.model.blocks import (
    PuzzleConfig,
    PuzzleModel,
    block_config,
    build_layer,
    build_rotary_embedding,
    model_class,
    puzzle_config,
)
from lit_puzzle.model.family import family_of
from lit_puzzle.model.modules import attention_of

DECODE_INPUTS = 8  # sets of tokens
OF_STORAGE = {"quantization_config", "transformers_version", "dtype", "torch_dtype"}  # layers are timed in one dtype

Row = dict[str, int | float | None]
Case = tuple[str, Row, Callable[[], Work]]


class IdentityLayer(nn.Module):
    """An identity layer in the place of a decoder layer."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the hidden states unchanged."""
        return hidden_states


@dataclass
class Bench:
    """The layers of one model shape on one machine; its methods prepare the work that is timed.

    Args:
        config: the plain dict of a `config.json`.
        machine: where and how the layers are run.
    """

    config: Mapping[str, Any]
    machine: Machine
    _layers: dict[int, list[Any]] = field(default_factory=dict)
    _models: dict[bool, PuzzleModel] = field(default_factory=dict)

    def decode_layer(self, block: Block, batch_size: int, context_tokens: int) -> Work:
        """Prepare one token per sequence, the last of `context_tokens`, through the copies of a layer."""
        config = self.child_config([block] * self.machine.copies)
        cache = filled_cache(config, batch_size, context_tokens - 1, self.machine)
        inputs = [self.machine.random(batch_size, 1, config.hidden_size) for _ in range(DECODE_INPUTS)]
        return self._through_layers(config, block, inputs, cache)

    def prefill_layer(self, block: Block, prompt_tokens: int) -> Work:
        """Prepare one prompt through the copies of a layer, with its keys and values written to a new cache."""
        config = self.child_config([block] * self.machine.copies)
        inputs = [self.machine.random(1, prompt_tokens, config.hidden_size)]
        return self._through_layers(config, block, inputs, DynamicCache(config=config))

    def decode_model(self, batch_size: int, context_tokens: int, with_layers: bool) -> Work:
        """Prepare a decode step to the next token, of the model of `config` or of that model without its layers."""
        model = self._model(with_layers)
        cache = filled_cache(model.config, batch_size, context_tokens - 1, self.machine)
        return self._through_model(model, [self._tokens(batch_size, 1) for _ in range(DECODE_INPUTS)], cache)

    def prefill_rest(self, prompt_tokens: int) -> Work:
        """Prepare one prompt through the model without its layers."""
        model = self._model(with_layers=False)
        return self._through_model(model, [self._tokens(1, prompt_tokens)], DynamicCache(config=model.config))

    def child_config(self, blocks: Sequence[Block]) -> PuzzleConfig:
        """Return the configuration of a model of this shape with these layers."""
        return puzzle_config(
            {name: value for name, value in self.config.items() if name not in OF_STORAGE},
            [block_config(block.num_experts, block.window_tokens) for block in blocks],
            attn_implementation=self.machine.attention,
            experts_implementation=self.machine.experts,
        )

    def _tokens(self, batch_size: int, tokens: int) -> Tensor:
        return torch.randint(self.config["vocab_size"], (batch_size, tokens), device=self.machine.device)

    def _through_layers(
        self, config: PuzzleConfig, block: Block, inputs: Sequence[Tensor], cache: DynamicCache
    ) -> Work:
        """Prepare hidden states (B, T, E), alternating between `inputs`, through the copies of a layer."""
        hidden_BTE, turns = inputs[0], cycle(inputs)
        seen = cache.get_seq_length()
        places_1T = (torch.arange(hidden_BTE.shape[1], device=hidden_BTE.device) + seen)[None]
        rotation = build_rotary_embedding(config).to(hidden_BTE.device)(hidden_BTE, places_1T)
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

    def _through_model(self, model: PuzzleModel, inputs: Sequence[Tensor], cache: DynamicCache) -> Work:
        """Prepare tokens (B, T), alternating between `inputs`, to the next token (B)."""
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

    def _copies(self, config: PuzzleConfig, block: Block) -> list[Any]:
        """Return the layers with the block's number of experts, set to its window: no weight depends on the window."""
        if block.num_experts not in self._layers:
            self._layers[block.num_experts] = [self._layer(config, index) for index in range(self.machine.copies)]
        for layer in self._layers[block.num_experts]:
            attention_of(layer, family_of(self.config)).sliding_window = block.window_tokens
        return self._layers[block.num_experts]

    def _layer(self, config: PuzzleConfig, index: int) -> Any:
        with torch.device(self.machine.device):
            layer = build_layer(config, index).to(self.machine.dtype).eval()
        for name, parameter in layer.named_parameters():
            if "norm" in name:  # with small norms the router's bias would choose the same experts for all tokens
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.0 if "bias" in name else 0.02)
        return layer

    def _model(self, with_layers: bool) -> PuzzleModel:
        if with_layers not in self._models:
            blocks = list(parent_blocks(self.config))
            if not with_layers:  # one identity layer for every window, so that all masks are made
                blocks = [Block(1, window) for window in dict.fromkeys(block.window_tokens for block in blocks)]
            with torch.device(self.machine.device):
                model = model_class(family_of(self.config))(self.child_config(blocks))
            if not with_layers:
                model.model.layers = nn.ModuleList(IdentityLayer() for _ in blocks)
            self._models[with_layers] = model.to(self.machine.dtype).eval()
        return self._models[with_layers]


@torch.inference_mode()
def measure(bench: Bench, points: Points, whole_model: bool) -> dict[str, list[Row]]:
    """Measure all rows of a table of timed blocks.

    Args:
        bench: the layers.
        points: what to measure.
        whole_model: whether to time decode steps of the whole model, too.

    Returns:
        Rows by kind: `decode_layer`, `prefill_layer`, `decode_rest`, `prefill_rest`, `whole_model`.
    """
    cases = [*_layer_cases(bench, points), *_rest_cases(bench, points, whole_model)]
    seconds = interleaved([prepare for _, _, prepare in cases], bench.machine.device, bench.machine.rounds)
    rows: dict[str, list[Row]] = {"whole_model": []}
    for (kind, row, _), taken in zip(cases, seconds, strict=True):
        share = bench.machine.copies if kind.endswith("layer") else 1
        rows.setdefault(kind, []).append({**row, "seconds": taken / share})
    return rows


def _layer_cases(bench: Bench, points: Points) -> Iterator[Case]:
    """Yield kind, row and preparation of everything that is measured of layers."""
    for window, experts in product(points.windows, points.experts):
        block = Block(experts, window)
        of_layer: Row = {"window_tokens": window, "num_experts": experts}
        for batch, context in product(points.batches, points.contexts_of(window)):
            row: Row = {**of_layer, "batch_size": batch, "context_tokens": context}
            yield "decode_layer", row, partial(bench.decode_layer, block, batch, context)
        for prompt in points.prompts:
            yield "prefill_layer", {**of_layer, "prompt_tokens": prompt}, partial(bench.prefill_layer, block, prompt)


def _rest_cases(bench: Bench, points: Points, whole_model: bool) -> Iterator[Case]:
    """Yield the same outside the layers, at the middle context (masks depend on it), and for the whole model."""
    middle = sorted(points.contexts)[len(points.contexts) // 2]
    for batch in points.batches:
        yield "decode_rest", {"batch_size": batch}, partial(bench.decode_model, batch, middle, with_layers=False)
        for context in points.contexts if whole_model else ():
            row: Row = {"batch_size": batch, "context_tokens": context}
            yield "whole_model", row, partial(bench.decode_model, batch, context, with_layers=True)
    for prompt in points.prompts:
        yield "prefill_rest", {"prompt_tokens": prompt}, partial(bench.prefill_rest, prompt)
