"""Local scores: how much each candidate of each layer changes the output of its own layer.

For the states y that leave the parent's layer and y_c with the candidate in its place, on the parent's own input:

    layer_error = sum (y - y_c)^2 / sum y^2       over the scored tokens of a sample and all channels

This is the loss of blockwise distillation (`lit_puzzle.distill.block_losses`). A candidate costs one layer, not the
(L - l) layers of the scores that look at the end of the model, and one pass over the layers scores all candidates.
The parent is in memory, or read layer by layer (`lit_puzzle.model.layer_pass`), to the same bits.

Reads nothing; writes the states between layers. Memory and disk: those of `lit_puzzle.model.layer_pass`, and three
states of one batch. Source: arXiv 2411.19146 (normalized error of a block's output).
Shapes: B sequences of a batch, T tokens, D hidden, N scored tokens, S samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lit_puzzle.library.swap import swapped
from lit_puzzle.model.layer_pass import LayerAtWork, LayerPass
from lit_puzzle.model.streaming import LayerSource
from lit_puzzle.scoring.block_quality import exact
from lit_puzzle.scoring.evidence import Routed, changes_experts
from lit_puzzle.scoring.footprint import error_bytes
from lit_puzzle.scoring.replace_block import Part
from lit_puzzle.scoring.score_files import Entry, Scored, Values

LAYER_ERROR = "layer_error"


def layer_errors(
    source: LayerSource,
    folder: Path,
    parts: Sequence[Part],
    num_samples: int,
    entries: Sequence[Entry],
    trained: Callable[[Entry], Mapping[str, Tensor]],
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Iterator[Scored]:
    """Yield each entry with the share of tokens routed otherwise, and how its error in every sample is computed.

    Args:
        source: the parent.
        folder: where the states between layers are kept; the caller removes it.
        parts: this process's batches.
        num_samples: number of sequences of all processes.
        entries: the candidates, in the order of their layers; at least one.
        trained: returns the trained tensors of an entry.
        sum_over_processes: returns the sum of a tensor over all processes.

    Raises:
        ValueError: the budget is too small for a layer and a batch.
    """
    largest = max(part.batch["input_ids"].numel() for part in parts)
    computing = error_bytes(largest, source.model.config.hidden_size)
    layers = LayerPass(source, folder, [part.batch for part in parts], computing)
    if layers.done > entries[0].layer:  # the files of finished candidates were removed since
        layers.restart()
    routed = Routed(source.model, [entry for entry in entries if changes_experts(entry)])
    routed.counts[-1] = sum(int(part.batch["attention_mask"].sum()) for part in parts)

    def values_of(at: LayerAtWork, entry: Entry) -> Values:
        with swapped(source.model, at.layer, entry.block, trained(entry)):
            sums_2S = _sums(at, parts, num_samples)
        error_S, norm_S = sum_over_processes(sums_2S)
        return {LAYER_ERROR: (error_S / norm_S.clamp(min=torch.finfo(norm_S.dtype).tiny)).tolist()}

    for at in layers:
        for index, part in enumerate(parts):
            with routed.counting_layer(at.layer, part.batch["attention_mask"]):
                at.run(index)
        counted = routed.shares(sum_over_processes)
        for entry in (one for one in entries if one.layer == at.layer):
            yield entry, counted.get(entry, 0.0), partial(values_of, at, entry)
        if at.layer == entries[-1].layer:
            return


def _sums(at: LayerAtWork, parts: Sequence[Part], num_samples: int) -> Tensor:
    """Return squared error and squared norm of each sample, (2, S), float64, with the candidate in place."""
    sums_2S = torch.zeros(2, num_samples, dtype=torch.float64)
    for index, part in enumerate(parts):
        scored_BT = part.batch["scored_mask"].bool()
        rows_B1 = torch.arange(len(scored_BT))[:, None]
        samples_N = (rows_B1 + part.first_sample).expand_as(scored_BT)[scored_BT]
        own_ND, child_ND = (states[scored_BT.to(states.device)] for states in (at.leaving(index), at.through(index)))
        own_ND, child_ND = own_ND.to(exact(own_ND.dtype)), child_ND.to(exact(child_ND.dtype))
        for row, values_ND in enumerate((child_ND - own_ND, own_ND)):
            sums_2S[row].index_add_(0, samples_N, values_ND.square_().sum(dim=-1).double().cpu())
    return sums_2S
