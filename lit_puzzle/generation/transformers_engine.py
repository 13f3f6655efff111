"""Completions by transformers' forward pass and a decoding loop of our own, for any model in memory.

Only `Sampling` decides how tokens are drawn: of a checkpoint's `generation_config.json` nothing but the end tokens is
read. The policy may be in training: modules keep their modes, the random state is not touched.

Over processes each has its own prompts. A model whose weights are whole on each of them (never sharded, or gathered
once with `lit_puzzle.training.sharding.unsharded`) needs no more. One that gathers its weights in each forward pass
needs every process in each of them: where the model is marked as transformers' own `generate` wants it
(`model._is_fsdp_managed_module = True`), a process that is done runs passes of one token until all are done.

Memory beside the weights: the KV cache of the rows in progress, at most batch_size * 2 * KV heads * head_dim * bytes
per value * sum over layers of min(window, prompt + max_new_tokens), one layer of it twice while it grows. Prompts are
read in linear memory; in float32 on a CPU + 4 copies of at most `EAGER_SCORES` (lit_puzzle.model.decoding_attention).
Reads and writes nothing. Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, distributed
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_fsdp_managed_module

from lit_puzzle.generation.decoding import Decoding, LoadedModel, Row, random_numbers
from lit_puzzle.generation.engine import Completion, OnCompletion, check_prompts
from lit_puzzle.generation.kv_rows import CompactCache, check_layers
from lit_puzzle.generation.policy import evaluation_mode
from lit_puzzle.generation.progress import Progress
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.stop_tokens import end_and_pad

MakeCache = Callable[[], Cache]  # an empty KV cache of the model


class TransformersEngine:
    """A model in memory, ready to generate.

    Args:
        model: on its device, whole or sharded.
        tokenizer: names the padding token and an end token.
        batch_size: completions decoded together.
        make_cache: the KV cache of a batch; None: one in the dtype of the projections.

    Raises:
        ValueError: no completions in a batch, no end token or no padding token is known, or the KV cache has layers of
            another kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        make_cache: MakeCache | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} was given; 1 or more is needed.")
        self.model = model
        self.batch_size = batch_size
        self.make_cache = make_cache or partial(CompactCache, config=model.config)
        self.end_ids, self.pad_id = end_and_pad(model, tokenizer)
        # An index, not 1: a slice of the states is not contiguous, and a CPU would copy a frozen head for every row.
        self._last = torch.tensor([-1], device=model.device)
        check_layers(self.make_cache())

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        rows: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Return one completion for each prompt; see `lit_puzzle.generation.engine.Engine`."""
        context_tokens = int(self.model.config.max_position_embeddings)
        numbers = check_prompts(prompts, rows, sampling.max_new_tokens, context_tokens)
        model = LoadedModel(self._forward, self.make_cache, frozenset(self.end_ids), self.pad_id, self.model.device)
        pairs = zip(prompts, numbers, strict=True)
        begun = [Row(prompt, random_numbers(sampling.seed, number), number) for prompt, number in pairs]

        def ended(row: Row) -> None:
            if on_completion is not None:
                on_completion(row.number, _completion(row, sampling))

        decoding, progress = Decoding(model, sampling, self.batch_size, begun, ended), Progress(len(begun))
        with evaluation_mode(self.model), torch.no_grad():
            while self._continues(decoding.busy):
                if decoding.busy:
                    decoding.step()
                    progress.update(decoding.finished, decoding.tokens)
                else:
                    self.model(input_ids=torch.tensor([[self.pad_id]], device=self.model.device), use_cache=False)
        return [_completion(row, sampling) for row in begun]

    def _continues(self, busy: bool) -> bool:
        """Return whether this process has to run another forward pass, for itself or for the others."""
        if not (is_fsdp_managed_module(self.model) and distributed.is_initialized()):
            return busy
        any_busy = torch.tensor(int(busy), device=self.model.device)
        distributed.all_reduce(any_busy, distributed.ReduceOp.MAX)
        return bool(any_busy)

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Cache) -> Tensor:
        output = self.model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self._last,
        )
        return output.logits[:, -1]


def _completion(row: Row, sampling: Sampling) -> Completion:
    assert row.finish is not None
    return Completion(row.token_ids, row.finish, row.logprobs if sampling.logprobs else None, row.seconds)
