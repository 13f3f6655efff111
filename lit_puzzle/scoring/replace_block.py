"""Replace one block: how each candidate of each layer changes the parent's final hidden states and logits.

Works layer by layer: holds the hidden states that enter layer l and the parent's final ones; runs layer l's candidates
through layers l..L; then advances one layer. A candidate of layer l of L costs (L - l) / L of a forward pass; the head
and the metrics are computed on scored tokens only.

Reads and writes nothing but the scratch file of `lit_puzzle.scoring.hidden_states`.

Memory of one of R processes, beside the model and one batch's activations, for T tokens (padding included), N of them
scored, D channels of b bytes, vocabulary V, chunks of n tokens:
    T D b / R (entering; in a file above `Memory.hidden_gib`) + N D b / R (final) + 4 N V / R (only where the parent's
    log-probabilities are kept) + 7 x 4 n V (metrics).
It does not depend on the number of layers or candidates. Traffic: 8 bytes x samples x metrics per candidate; when
sharded, the layers that a candidate runs through are gathered once per batch.

Source: arXiv 2602.11937 section 4, arXiv 2411.19146.
Shapes: B sequences of a batch, T tokens of the longest, D hidden, N scored tokens, V vocabulary, S samples, M metrics.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lit_puzzle.data.batches import PaddedBatch
from lit_puzzle.data.calibration import RankBatches
from lit_puzzle.library.swap import swapped
from lit_puzzle.model.blocks import PuzzleModel
from lit_puzzle.model.layer_pass import layer_inputs, run_layer
from lit_puzzle.scoring.block_quality import (
    METRICS,
    NO_TOKEN,
    ScoredTokens,
    exact,
    log_probabilities,
    quality_loss_sums,
    token_counts,
)
from lit_puzzle.scoring.evidence import Routed
from lit_puzzle.scoring.hidden_states import bytes_of, hold
from lit_puzzle.scoring.settings import Memory
from lit_puzzle.spec import BlockSpec

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """One batch of this process, and the positions of its tokens among those that are held.

    Attributes:
        batch: `input_ids`, `attention_mask`, `scored_mask`, each (B, T).
        first_token: position of its first token.
        scored: positions of its scored tokens among all scored ones.
        first_sample: index of its first sequence among all samples.
    """

    batch: PaddedBatch
    first_token: int
    scored: slice
    first_sample: int

    @property
    def tokens(self) -> slice:
        """Positions of its tokens, padding included."""
        return slice(self.first_token, self.first_token + self.batch["input_ids"].numel())


def lay_out(
    batches: Sequence[Sequence[ArrayLike]],
    rank: int,
    world_size: int,
    prompt_lengths: Sequence[Sequence[int]] | None = None,
) -> list[Part]:
    """Return this process's batches, as many as every other process has; in a repeated one nothing is scored.

    Args:
        batches: token ids of all processes.
        rank: rank of this process.
        world_size: number of processes.
        prompt_lengths: number of prompt tokens of each sequence. Only tokens whose next token was generated are scored;
            of a sequence with 0, and without `prompt_lengths`, all tokens are.
    """
    firsts = [0, *accumulate(len(batch) for batch in batches)]
    parts: list[Part] = []
    tokens = scored = 0
    for turn, batch in enumerate(RankBatches(batches, rank, world_size)):
        index = min(rank + turn * world_size, len(batches) - 1)
        if prompt_lengths is not None:
            batch["scored_mask"] &= before_generated(batch["attention_mask"], prompt_lengths[index])
        count = int(batch["scored_mask"].sum())
        parts.append(Part(batch, tokens, slice(scored, scored + count), firsts[index]))
        tokens, scored = tokens + batch["input_ids"].numel(), scored + count
    return parts


class ReplaceOneBlock:
    """The pass over one parent: `advance(l)`, then `quality_loss(...)` for each of layer l's candidates, l ascending.

    Args:
        model: the parent, sharded or not, in evaluation mode.
        parts: this process's batches.
        num_samples: number of sequences of all processes.
        memory: how much memory may be used.
        scratch: file for the hidden states, if they do not fit into memory.
        sum_over_processes: returns the sum of a tensor over all processes.
    """

    def __init__(
        self,
        model: PuzzleModel,
        parts: Sequence[Part],
        num_samples: int,
        memory: Memory,
        scratch: Path,
        sum_over_processes: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.parts, self.num_samples = model, parts, num_samples
        self.sum_over_processes = sum_over_processes
        self.device = model.device
        self.chunk_tokens = memory.chunk_tokens(model.config.vocab_size, model.device.type)
        self.layer = 0
        channels, tokens = model.config.hidden_size, parts[-1].tokens.stop
        fits = bytes_of(tokens, channels, model.dtype) <= memory.hidden_gib * GIB
        self.entering_TD = hold(tokens, channels, model.dtype, None if fits else scratch)
        self.final_ND = torch.empty(parts[-1].scored.stop, channels, dtype=model.dtype)
        kept = bytes_of(len(self.final_ND), model.config.vocab_size, exact(model.dtype)) <= memory.log_probs_gib * GIB
        self.log_probs_NV: Tensor | None = None
        if kept:
            self.log_probs_NV = torch.empty(len(self.final_ND), model.config.vocab_size, dtype=exact(model.dtype))

    @torch.no_grad()
    def start(self, layer: int, routed: Routed | None = None) -> None:
        """Run the whole parent once; keep the hidden states that enter `layer` and the final ones.

        Args:
            layer: layer whose candidates come first.
            routed: counts how the parent routes its tokens.
        """
        for part in self.parts:
            batch = self._on_device(part.batch)
            hidden_BTD = self.model.model.embed_tokens(batch["input_ids"])
            with nullcontext() if routed is None else routed.counting(batch["attention_mask"]):
                hidden_BTD = self._run(hidden_BTD, batch, 0, layer)
                self.entering_TD[part.tokens] = hidden_BTD.flatten(0, 1).cpu()
                hidden_BTD = self._run(hidden_BTD, batch, layer, None)
            final_ND = self._final(hidden_BTD, batch)
            self.final_ND[part.scored] = final_ND.cpu()
            if self.log_probs_NV is not None:
                chunks = zip(
                    final_ND.split(self.chunk_tokens),
                    self.log_probs_NV[part.scored].split(self.chunk_tokens),
                    strict=True,
                )
                for hidden_ND, kept_NV in chunks:
                    kept_NV.copy_(log_probabilities(hidden_ND, self.model.lm_head))
        self.layer = layer

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Run the parent's own blocks from the present layer up to `layer`, which becomes the present one."""
        for part in self.parts if layer > self.layer else ():
            batch = self._on_device(part.batch)
            hidden_BTD = self._run(self._entering(part), batch, self.layer, layer)
            self.entering_TD[part.tokens] = hidden_BTD.flatten(0, 1).cpu()
        self.layer = layer

    @torch.no_grad()
    def quality_loss(
        self,
        block: BlockSpec,
        trained: Mapping[str, Tensor] | None = None,
        rows: Sequence[Tensor] | None = None,
    ) -> dict[str, list[float]]:
        """Compute every metric of every sample with `block` in place of the present layer.

        Args:
            block: the candidate.
            trained: its trained tensors by their names inside the layer.
            rows: for each batch, which of its sequences are run, (B,) bool; the others have 0 in every metric. None:
                all of them.

        Returns:
            Metric -> value of each sample, the same on all processes.
        """
        with swapped(self.model, self.layer, block, trained):
            chosen = [None] * len(self.parts) if rows is None else rows
            kept = [(part, rows_B) for part, rows_B in zip(self.parts, chosen, strict=True) if _any(rows_B)]
            results = (self._results(part, rows_B) for part, rows_B in kept)
            head, chunk = self.model.lm_head, self.chunk_tokens
            return sample_values(results, self.num_samples, head, chunk, self.sum_over_processes)

    def _results(self, part: Part, rows_B: Tensor | None) -> tuple[ScoredTokens, Tensor]:
        """Return the scored tokens of a batch, or of some of its rows, and their final states with the candidate."""
        batch, entering_BTD = self._on_device(part.batch), self._entering(part)
        log_probs = None if self.log_probs_NV is None else self.log_probs_NV[part.scored]
        tokens = scored_tokens(part, self.final_ND[part.scored].to(self.device), log_probs)
        if rows_B is not None:
            rows_B = rows_B.to(self.device)
            scored_BT = batch["scored_mask"].bool()
            tokens = tokens.only(rows_B[:, None].expand_as(scored_BT)[scored_BT])
            batch, entering_BTD = {name: tensor[rows_B] for name, tensor in batch.items()}, entering_BTD[rows_B]
        return tokens, self._final(self._run(entering_BTD, batch, self.layer, None), batch)

    def _entering(self, part: Part) -> Tensor:
        shape = (*part.batch["input_ids"].shape, -1)
        return self.entering_TD[part.tokens].view(shape).to(self.device)

    def _on_device(self, batch: PaddedBatch) -> PaddedBatch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _run(self, hidden_BTD: Tensor, batch: PaddedBatch, first: int, last: int | None) -> Tensor:
        """Run hidden states through the layers first..last, `last` not included."""
        inputs = layer_inputs(self.model, hidden_BTD, batch)
        for layer in range(self.model.config.num_hidden_layers)[first:last]:
            hidden_BTD = run_layer(self.model, layer, hidden_BTD, inputs)
        return hidden_BTD

    def _final(self, hidden_BTD: Tensor, batch: PaddedBatch) -> Tensor:
        """Return the hidden states of the scored tokens as the head reads them, (N, D)."""
        return self.model.model.norm(hidden_BTD[batch["scored_mask"].bool()])


def _any(rows_B: Tensor | None) -> bool:
    return rows_B is None or bool(rows_B.any())


def scored_tokens(part: Part, final_ND: Tensor, log_probs_NV: Tensor | None = None) -> ScoredTokens:
    """Return the scored tokens of a batch with the parent's results on them, on the device of those."""
    batch = {name: tensor.to(final_ND.device) for name, tensor in part.batch.items()}
    scored_BT = batch["scored_mask"].bool()
    rows_B1 = torch.arange(len(scored_BT), device=final_ND.device)[:, None]
    targets_BT = next_tokens(batch["input_ids"], batch["attention_mask"])
    samples_N = (rows_B1 + part.first_sample).expand_as(scored_BT)[scored_BT]
    return ScoredTokens(samples_N, targets_BT[scored_BT], final_ND, log_probs_NV)


def sample_values(
    results: Iterable[tuple[ScoredTokens, Tensor]],
    num_samples: int,
    head: Callable[[Tensor], Tensor],
    chunk_tokens: int,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> dict[str, list[float]]:
    """Compute every metric of every sample from final hidden states.

    Args:
        results: for each batch its scored tokens and their final states with a candidate in place, (N, D).
        num_samples: number of sequences of all processes.
        head: hidden states (N, D) -> logits (N, V).
        chunk_tokens: tokens whose logits exist at a time.
        sum_over_processes: returns the sum of a tensor over all processes.

    Returns:
        Metric -> value of each sample, the same on all processes.
    """
    sums_SM = torch.zeros(num_samples, len(METRICS), dtype=torch.float64)
    counts_SM = torch.zeros_like(sums_SM)
    for tokens, child_ND in results:
        sums_SM += quality_loss_sums(tokens, child_ND, head, num_samples, chunk_tokens).cpu()
        counts_SM += token_counts(tokens.samples_N, tokens.targets_N, num_samples).cpu()
    values_SM = sum_over_processes(sums_SM) / sum_over_processes(counts_SM).clamp(min=1)
    return {name: values_SM[:, column].tolist() for column, name in enumerate(METRICS)}


def before_generated(mask_BT: Tensor, prompt_lengths: Sequence[int]) -> Tensor:
    """Mark the tokens of right-padded sequences whose next token was generated; all tokens for a prompt length of 0.

    Returns:
        Shape (B, T), bool.
    """
    positions_1T = torch.arange(mask_BT.shape[1])[None]
    prompts_B1, lengths_B1 = torch.tensor(prompt_lengths)[:, None], mask_BT.sum(dim=1, keepdim=True)
    return (prompts_B1 == 0) | (positions_1T >= prompts_B1 - 1) & (positions_1T < lengths_B1 - 1)


def next_tokens(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the next token of each token in its sequence, or NO_TOKEN, shape (B, T)."""
    targets_BT = torch.full_like(ids_BT, NO_TOKEN)
    targets_BT[:, :-1] = torch.where(mask_BT[:, 1:].bool(), ids_BT[:, 1:], NO_TOKEN)
    return targets_BT
