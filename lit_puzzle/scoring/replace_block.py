"""Replace one block: what each candidate of each layer does to the end of the parent, layer by layer.

Reads and writes nothing but the scratch file of `lit_puzzle.scoring.hidden_states`. Holds the hidden states
that enter layer l and the parent's final ones; scores layer l's candidates through layers l..L; then advances one
layer. A candidate of layer l of L costs (L - l) / L of a forward pass, its head and its metrics on scored tokens only.

Memory of one of R processes, beside the model and one batch's activations, for T tokens (padding included), N of them
scored, D channels of b bytes, vocabulary V, chunks of n tokens:
    T D b / R (entering; in a file where asked for) + N D b / R (final) + 4 N V / R (only where the parent's
    log-probabilities are kept) + 7 x 4 n V (metrics).
Neither the number of layers nor that of candidates is in it. Traffic: 8 bytes x samples x metrics per candidate; when
sharded, the layers a candidate runs through are gathered once per batch.

Source: arXiv 2602.11937 section 4, arXiv 2411.19146.
Shapes: B sequences of a batch, T tokens of the longest, D hidden, N scored tokens, V vocabulary, S samples, M metrics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_puzzle.data.calibration import Batch, RankBatches
from lit_puzzle.library.swap import swapped
from lit_puzzle.model.gpt_oss import GptOssPuzzleForCausalLM
from lit_puzzle.scoring.block_quality import (
    METRICS,
    NO_TOKEN,
    ScoredTokens,
    exact,
    log_probabilities,
    quality_loss_sums,
    token_counts,
)
from lit_puzzle.scoring.hidden_states import bytes_of, hold
from lit_puzzle.spec import BlockSpec

GIB = 2**30
FEWEST_TOKENS = 64  # for fewer, reading the head's weights would take longer than multiplying with them


@dataclass(frozen=True)
class Memory:
    """How much a process may keep beside the model.

    Attributes:
        hidden_gib: Hidden states entering a layer above this size go to a file in the run folder.
        log_probs_gib: The parent's log-probabilities above this size are computed again for every candidate.
        chunk_logits: Tokens x vocabulary whose logits exist at a time, but never fewer than those of 64 tokens; each
            takes up to 28 bytes. None: 2**19 on a CPU, where they stay in its cache (2,048 entries: half the time of
            2**21), and 2**26 elsewhere.
    """

    hidden_gib: float = 8.0
    log_probs_gib: float = 1.0
    chunk_logits: int | None = None

    def __post_init__(self) -> None:
        if min(self.hidden_gib, self.log_probs_gib) < 0 or (self.chunk_logits or 1) < 1:
            raise ValueError(f"memory: sizes must be 0 or more and chunk_logits 1 or more, got {self}")

    def chunk_tokens(self, vocab_size: int, device: torch.device) -> int:
        """Tokens whose logits exist at a time."""
        logits = self.chunk_logits or (2**19 if device.type == "cpu" else 2**26)
        return max(FEWEST_TOKENS, logits // vocab_size)


@dataclass(frozen=True)
class Part:
    """One batch of this process and where its tokens lie among those that are held.

    Attributes:
        batch: `input_ids`, `attention_mask`, `scored_mask`, each (B, T).
        first_token: Place of its first token.
        scored: Places of its scored tokens among all scored ones.
        first_sample: Number of its first sequence among all samples.
    """

    batch: Batch
    first_token: int
    scored: slice
    first_sample: int

    @property
    def tokens(self) -> slice:
        """Places of its tokens, padding included."""
        return slice(self.first_token, self.first_token + self.batch["input_ids"].numel())


def lay_out(
    batches: Sequence[Sequence[Sequence[int]]],
    rank: int,
    world_size: int,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[Part]:
    """This process's batches; every process gets as many, a repeated one has nothing scored.

    Args:
        batches: Token lists of all processes.
        rank: Of this process.
        world_size: Number of processes.
        prompts: For each sequence how many tokens the parent was given. Then only those tokens are scored from which
            it wrote the next one; of a sequence with 0, and without `prompts`, all of them.
    """
    firsts = [sum(len(batch) for batch in batches[:index]) for index in range(len(batches))]
    parts: list[Part] = []
    tokens = scored = 0
    for turn, batch in enumerate(RankBatches(batches, rank, world_size)):
        index = min(rank + turn * world_size, len(batches) - 1)
        if prompts is not None:
            batch["scored_mask"] &= written_tokens(batch["attention_mask"], prompts[index])
        count = int(batch["scored_mask"].sum())
        parts.append(Part(batch, tokens, slice(scored, scored + count), firsts[index]))
        tokens, scored = tokens + batch["input_ids"].numel(), scored + count
    return parts


class ReplaceOneBlock:
    """The pass over one parent: `advance(l)`, then `damage(l, ...)` for each of layer l's candidates, l ascending.

    Args:
        model: The parent, sharded or not, in evaluation mode.
        parts: This process's batches.
        num_samples: Sequences of all processes.
        memory: What may be kept.
        scratch: File for the hidden states, if they need one.
        sum_over_processes: Adds a tensor up over processes.
    """

    def __init__(
        self,
        model: GptOssPuzzleForCausalLM,
        parts: Sequence[Part],
        num_samples: int,
        memory: Memory,
        scratch: Path,
        sum_over_processes: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.parts, self.num_samples = model, parts, num_samples
        self.sum_over_processes = sum_over_processes
        self.device = model.device
        self.chunk_tokens = memory.chunk_tokens(model.config.vocab_size, model.device)
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
    def start(self, layer: int) -> None:
        """The whole parent once: keeps what enters `layer` and its final states."""
        for part in self.parts:
            batch = self._on_device(part.batch)
            hidden_BTD = self.model.model.embed_tokens(batch["input_ids"])
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
        """From what enters the present layer to what enters `layer`, through the parent's own blocks."""
        for part in self.parts if layer > self.layer else ():
            batch = self._on_device(part.batch)
            hidden_BTD = self._run(self._entering(part), batch, self.layer, layer)
            self.entering_TD[part.tokens] = hidden_BTD.flatten(0, 1).cpu()
        self.layer = layer

    @torch.no_grad()
    def quality_loss(self, block: BlockSpec, trained: Mapping[str, Tensor] | None = None) -> dict[str, list[float]]:
        """Every metric of every sample with `block` in place of the present layer, on all processes."""
        sums_SM = torch.zeros(self.num_samples, len(METRICS), dtype=torch.float64)
        counts_SM = torch.zeros_like(sums_SM)
        with swapped(self.model, self.layer, block, trained):
            for part in self.parts:
                batch = self._on_device(part.batch)
                child_ND = self._final(self._run(self._entering(part), batch, self.layer, None), batch)
                tokens = self._scored_tokens(part, batch)
                size = self.num_samples
                sums_SM += quality_loss_sums(tokens, child_ND, self.model.lm_head, size, self.chunk_tokens).cpu()
                counts_SM += token_counts(tokens.samples_N, tokens.targets_N, size).cpu()
        values_SM = self.sum_over_processes(sums_SM) / self.sum_over_processes(counts_SM).clamp(min=1)
        return {name: values_SM[:, column].tolist() for column, name in enumerate(METRICS)}

    def _entering(self, part: Part) -> Tensor:
        shape = (*part.batch["input_ids"].shape, -1)
        return self.entering_TD[part.tokens].view(shape).to(self.device)

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _run(self, hidden_BTD: Tensor, batch: Batch, first: int, last: int | None) -> Tensor:
        """Hidden states through layers first..last, `last` not included."""
        body = self.model.model
        masks = body._masks(hidden_BTD, batch["attention_mask"], None, None)
        positions_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        rotation = body.rotary_emb(hidden_BTD, positions_1T)
        blocks = self.model.config.block_configs
        for layer, block in list(zip(body.layers, blocks, strict=True))[first:last]:
            hidden_BTD = layer(
                hidden_BTD,
                attention_mask=masks[block["sliding_window"]],
                position_embeddings=rotation,
                position_ids=positions_1T,
            )
        return hidden_BTD

    def _final(self, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """What the head reads of the scored tokens, (N, D)."""
        return self.model.model.norm(hidden_BTD[batch["scored_mask"].bool()])

    def _scored_tokens(self, part: Part, batch: Batch) -> ScoredTokens:
        scored_BT = batch["scored_mask"].bool()
        rows_B1 = torch.arange(len(scored_BT), device=self.device)[:, None]
        log_probs = None if self.log_probs_NV is None else self.log_probs_NV[part.scored].to(self.device)
        return ScoredTokens(
            (rows_B1 + part.first_sample).expand_as(scored_BT)[scored_BT],
            next_tokens(batch["input_ids"], batch["attention_mask"])[scored_BT],
            self.final_ND[part.scored].to(self.device),
            log_probs,
        )


def written_tokens(mask_BT: Tensor, prompts: Sequence[int]) -> Tensor:
    """Which tokens of right-padded sequences are followed by one that is not of the prompt; all, for a prompt of 0."""
    places_1T = torch.arange(mask_BT.shape[1])[None]
    prompts_B1, lengths_B1 = torch.tensor(prompts)[:, None], mask_BT.sum(dim=1, keepdim=True)
    return (prompts_B1 == 0) | (places_1T >= prompts_B1 - 1) & (places_1T < lengths_B1 - 1)


def next_tokens(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The token after each token of its sequence, or NO_TOKEN, shape (B, T)."""
    targets_BT = torch.full_like(ids_BT, NO_TOKEN)
    targets_BT[:, :-1] = torch.where(mask_BT[:, 1:].bool(), ids_BT[:, 1:], NO_TOKEN)
    return targets_BT
