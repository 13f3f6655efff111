"""Continuous batching: which forward pass comes next, and for which rows.

Prompts wait in a queue, shortest first. Rows in progress lie in batches of like length: class k holds rows of up to
CLASS_TOKENS * 2^k tokens, so that a long completion does not widen the attention of short ones. A row that outgrows
its class moves, with its KV cache, to a batch of the next one. Each step is one forward pass of the class with most
rows, those that the queue can add included: either a group of prompts is read, or every row gets one more token.
Finished rows leave, and free rows are filled, once they are a share 1 / SHARE of a batch. What has been read is never
read again.

Reads and writes nothing. Memory: the KV cache of all rows in progress, whatever their class at most the batch size.
Shapes: B rows of a batch, T tokens of the longest prompt, W columns of the cache and the new one, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache

from lit_puzzle.generation.draws import draw_tokens, uniforms
from lit_puzzle.generation.kv_rows import gather_rows
from lit_puzzle.generation.padding import pad_left
from lit_puzzle.generation.sampling import Sampling

SHARE = 8
CLASS_TOKENS = 256
PREFILL_PAIRS = 2**24  # rows * T * T of prompts read together
UNIFORMS = 64  # random numbers of a row that are made at once


@dataclass(frozen=True)
class LoadedModel:
    """What decoding needs of a model.

    Args:
        forward: (token ids, mask of all columns, positions, cache) -> logits (B, V) of the next tokens.
        make_cache: an empty KV cache.
        end_ids: tokens that end a completion.
        pad_id: fills up shorter prompts.
        device: of the inputs.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
    make_cache: Callable[[], Cache]
    end_ids: frozenset[int]
    pad_id: int
    device: torch.device


@dataclass
class Row:
    """A completion in progress.

    Args:
        prompt: its token ids.
        randoms: a random number for each token that may be generated.
        number: of its prompt.
        token_ids: generated so far.
        logprobs: of `token_ids`, if they are asked for.
        finish: why it ended; None while it is in progress.
        seconds: from the start of the decoding to its last token.
    """

    prompt: Sequence[int]
    randoms: Iterator[float]
    number: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    seconds: float | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.token_ids)


def random_numbers(seed: int, row: int) -> Iterator[float]:
    """Yield the random numbers of a row, position after position."""
    for start in count(0, UNIFORMS):
        yield from uniforms(seed, row, start, UNIFORMS).tolist()


@dataclass
class Batch:
    """Rows that are decoded together.

    Args:
        rows: finished ones may be among them; they are decoded, and ignored, until the batch is settled.
        cache: their KV cache.
        last_B: the newest token of each row, not in the cache yet.
        cached_B: tokens of each row in the cache.
    """

    rows: list[Row]
    cache: Cache
    last_B: Tensor
    cached_B: Tensor


class Decoding:
    """All completions of one call, from the first prompt to the last token.

    Args:
        model: what generates.
        sampling: how tokens are drawn.
        batch_size: most rows in progress.
        rows: the completions, none of them begun.
        on_end: called with each row that has ended.
    """

    def __init__(
        self,
        model: LoadedModel,
        sampling: Sampling,
        batch_size: int,
        rows: Sequence[Row],
        on_end: Callable[[Row], None] = lambda _: None,
    ) -> None:
        self.on_end = on_end
        self.model = model
        self.sampling = sampling
        self.batch_size = batch_size
        self.queue = deque(sorted(rows, key=lambda row: row.length))
        self.batches: dict[int, list[Batch]] = {}  # of each class of length
        self.finished = 0
        self.tokens = 0
        self.begun = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether any completion is unfinished."""
        return bool(self.queue or self.batches)

    def step(self) -> None:
        """Run one forward pass."""
        size, reads = self._choose()
        if reads:
            batch = self._read_prompts()
            size = size_class(batch.rows[-1].length)
        else:
            batch = self._join(self.batches.pop(size))
            self._decode(batch)
        self._settle(size, batch)

    def _choose(self) -> tuple[int, bool]:
        """Return the class with most rows, and whether it reads prompts next."""
        rows = {size: sum(len(part.rows) for part in parts) for size, parts in self.batches.items()}
        free = self.batch_size - sum(rows.values())
        head = size_class(self.queue[0].length) if self.queue else None
        if head is not None and (free * SHARE >= self.batch_size or not rows):
            rows[head] = rows.get(head, 0) + min(free, len(self.queue))
        else:
            head = None
        chosen = max(rows, key=lambda size: (rows[size], size))
        return chosen, chosen == head

    def _read_prompts(self) -> Batch:
        """Take prompts from the queue, as many as there is room for, and read them."""
        free = self.batch_size - sum(len(part.rows) for parts in self.batches.values() for part in parts)
        rows: list[Row] = []
        while self.queue and len(rows) < free:
            if rows and (len(rows) + 1) * self.queue[0].length ** 2 > PREFILL_PAIRS:
                break
            rows.append(self.queue.popleft())
        padded = pad_left([row.prompt for row in rows], self.model.pad_id)
        ids_BT, mask_BT = (x.to(self.model.device) for x in padded)
        cache = self.model.make_cache()
        logits_BV = self.model.forward(ids_BT, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0), cache)
        return Batch(rows, cache, self._draw(rows, logits_BV), mask_BT.sum(-1))

    def _decode(self, batch: Batch) -> None:
        """Add one token to every row of a batch."""
        batch.cached_B += 1
        columns = batch.cache.get_seq_length() + 1
        mask_BW = torch.arange(columns, device=self.model.device) >= columns - batch.cached_B[:, None]
        logits_BV = self.model.forward(batch.last_B[:, None], mask_BW, batch.cached_B[:, None] - 1, batch.cache)
        batch.last_B = self._draw(batch.rows, logits_BV)

    def _draw(self, rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        """Draw a token for every row, append it where the row is unfinished, and note what ended."""
        sampling = self.sampling
        numbers = [0.0 if row.finish or not sampling.temperature else next(row.randoms) for row in rows]
        uniform_B = torch.tensor(numbers, dtype=torch.float64, device=logits_BV.device)
        if not bool(logits_BV.amax(-1).isfinite().all()):
            raise ValueError("The model's logits are not finite: its weights are damaged, or overflow in their dtype.")
        token_B = draw_tokens(logits_BV, sampling.temperature, sampling.top_p, uniform_B)
        logprobs = _logprobs(logits_BV, token_B).tolist() if sampling.logprobs else [0.0] * len(rows)
        for row, token, logprob in zip(rows, token_B.tolist(), logprobs, strict=True):
            if row.finish:
                continue
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            if token in self.model.end_ids:
                row.finish = "stop"
            elif len(row.token_ids) == sampling.max_new_tokens:
                row.finish = "length"
            self.tokens += 1
            if row.finish:
                self.finished += 1
                row.seconds = round(time.monotonic() - self.begun, 3)
                self.on_end(row)
        return token_B

    def _settle(self, size: int, batch: Batch) -> None:
        """Put a batch back, without finished rows and those that outgrew its class once they are enough."""
        limit = CLASS_TOKENS << size
        stay = [i for i, row in enumerate(batch.rows) if not row.finish and row.length <= limit]
        grown = [i for i, row in enumerate(batch.rows) if not row.finish and row.length > limit]
        leaving = len(batch.rows) - len(stay)
        if leaving * SHARE < len(batch.rows) and batch.cache.get_seq_length() < 2 * limit:
            self.batches.setdefault(size, []).append(batch)
            return
        for kept, target, free in ((grown, size + 1, not stay), (stay, size, True)):
            if kept:
                part = self._gather([(batch, kept)], free) if leaving else batch
                self.batches.setdefault(target, []).append(part)

    def _join(self, parts: Sequence[Batch]) -> Batch:
        """Return the batches as one."""
        if len(parts) == 1:
            return parts[0]
        return self._gather([(part, [i for i, row in enumerate(part.rows) if not row.finish]) for part in parts], True)

    def _gather(self, parts: Sequence[tuple[Batch, Sequence[int]]], free: bool) -> Batch:
        rows = [batch.rows[i] for batch, kept in parts for i in kept]
        width = max(row.length for row in rows) - 1  # the newest token is not in the cache
        cache = gather_rows([(batch.cache, kept) for batch, kept in parts], self.model.make_cache(), width, free)
        return Batch(
            rows,
            cache,
            torch.cat([batch.last_B[list(kept)] for batch, kept in parts]),
            torch.cat([batch.cached_B[list(kept)] for batch, kept in parts]),
        )


def _logprobs(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    logits_BV = logits_BV.float()
    return logits_BV.gather(1, token_B[:, None])[:, 0] - logits_BV.logsumexp(-1)


def size_class(length: int) -> int:
    """Return the class of a row: the smallest k with length <= CLASS_TOKENS * 2^k."""
    return max(-(-length // CLASS_TOKENS) - 1, 0).bit_length()
