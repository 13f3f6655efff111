"""What the data can tell about a candidate: the share of tokens, or of an evaluation's items, that it can change.

A score that was not measured is not a zero. A window changes nothing in a sequence no longer than itself, and a pruned
expert nothing for tokens that are routed to others: such a candidate would score 0 in every metric and look free.

    window W     share of the scored tokens that have more than W tokens up to and including themselves
    experts      share of all tokens that the parent routes to an expert that the candidate has not, counted while the
                 parent runs
    a pair       the larger of the two
    evaluation   share of the items whose prompt and completion together are longer than W

Where the share is 0 there is no score. The shares of windows are known before anything runs; the stage then says which
candidates its data cannot judge.

Reads and writes nothing. Memory: one bool per token of a batch, one per sequence and candidate. Traffic: 8 bytes per
candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lit_puzzle.model.blocks import PuzzleModel
from lit_puzzle.model.modules import decoder_layer, model_family, router_of
from lit_puzzle.scoring.score_files import Entry


def window_share(lengths: Sequence[tuple[int, int]], window: int | None) -> float:
    """Return the share of scored tokens that a window can change; 1 without a window.

    Args:
        lengths: tokens and prompt tokens of every sequence. Scored are the tokens whose next one was generated; of a
            sequence with 0 prompt tokens all are.
        window: window in tokens.
    """
    if window is None:
        return 1.0
    scored = far = 0
    for tokens, prompt in lengths:
        first, last = (prompt - 1, tokens - 1) if prompt else (0, tokens)  # places first .. last - 1
        scored += max(0, last - first)
        far += max(0, last - max(first, window))  # the token at place w is the first with w tokens before it
    return far / scored if scored else 0.0


def item_share(tokens: Sequence[int], window: int | None) -> float:
    """Return the share of items that are longer than a window; 1 without a window."""
    return 1.0 if window is None else sum(length > window for length in tokens) / len(tokens)


def changed_window(entry: Entry) -> int | None:
    """Return the window that an entry changes; None for one that changes experts only."""
    return entry.block.window_tokens if "window=" in entry.name else None


def changes_experts(entry: Entry) -> bool:
    """Return whether an entry has fewer experts than the parent."""
    return "experts=" in entry.name


def unjudged(shares: Mapping[Entry, float], what: str) -> str:
    """Return in words which entries have a share of 0, by name; empty where there are none."""
    layers: dict[str, list[int]] = {}
    for entry, share in shares.items():
        if share == 0:
            layers.setdefault(entry.name, []).append(entry.layer)
    listed = "; ".join(f"{name} in layers {', '.join(map(str, of))}" for name, of in layers.items())
    return f"these candidates get no score, none of the {what} can tell: {listed}" if layers else ""


class Routed:
    """Counts, while the parent runs, the tokens that are routed to an expert that an entry has not.

    Args:
        model: the parent.
        entries: what is counted; those that keep every expert count nothing.

    Attributes:
        rows: for each entry and each batch of `counting`, which of its sequences have such a token, (B,) bool.
    """

    def __init__(self, model: PuzzleModel, entries: Sequence[Entry]) -> None:
        self.rows: dict[Entry, list[Tensor]] = {entry: [] for entry in entries}
        self.model, family = model, model_family(model)
        self.routers = {entry.layer: router_of(decoder_layer(model, entry.layer), family) for entry in entries}
        self.removed: dict[Entry, Tensor] = {}
        for entry in entries:
            removed_E = torch.ones(self.routers[entry.layer].num_experts, dtype=torch.bool, device=model.device)
            removed_E[list(entry.block.experts)] = False
            self.removed[entry] = removed_E
        self.counts = torch.zeros(len(entries) + 1, dtype=torch.float64, device=model.device)  # the last: all tokens

    @contextmanager
    def counting(self, mask_BT: Tensor) -> Iterator[None]:
        """Count the tokens of a batch, those in the mask, while the parent runs once."""
        mask_N = mask_BT.flatten().bool()
        self.counts[-1] += mask_N.sum()
        with ExitStack() as stack:
            for layer, router in self.routers.items():
                stack.callback(router.register_forward_hook(self._hook(layer, mask_N, len(mask_BT))).remove)
            yield

    @contextmanager
    def counting_layer(self, layer: int, mask_BT: Tensor) -> Iterator[None]:
        """Count the tokens of a batch while the parent's layer runs; `counts[-1]` is left to the caller."""
        mask_N = mask_BT.to(self.counts.device).flatten().bool()
        with ExitStack() as stack:
            if layer in self.routers:
                stack.callback(self.routers[layer].register_forward_hook(self._hook(layer, mask_N)).remove)
            yield

    def _hook(self, layer: int, mask_N: Tensor, rows: int | None = None) -> Callable[..., None]:
        def count(_router: object, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            for place, (entry, removed_E) in enumerate(self.removed.items()):
                if entry.layer == layer:
                    changed_N = removed_E[output[2]].any(dim=-1) & mask_N
                    self.counts[place] += changed_N.sum()
                    if rows is not None:
                        self.rows[entry].append(changed_N.view(rows, -1).any(dim=-1))

        return count

    def shares(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[Entry, float]:
        """Return the share of every entry over all processes."""
        *counts, total = sum_over_processes(self.counts.cpu()).tolist()
        return {entry: count / total for entry, count in zip(self.removed, counts, strict=True)}
