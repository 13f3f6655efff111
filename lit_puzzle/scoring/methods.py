"""The way in which candidates are scored: to the end of the model or by their own layer, in memory or streamed.

Writes scratch files below a folder; nothing else. Memory and disk: those of the way that is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree

from torch import Tensor

from lit_puzzle.model.streaming import LayerSource, StreamedModel
from lit_puzzle.scoring.evidence import Routed, changes_experts
from lit_puzzle.scoring.layer_errors import layer_errors
from lit_puzzle.scoring.replace_block import Part, ReplaceOneBlock
from lit_puzzle.scoring.score_files import Entry, Scored, Values
from lit_puzzle.scoring.settings import ScoringSettings
from lit_puzzle.scoring.streamed_scores import StreamedScores


def candidate_values(
    source: LayerSource,
    scratch: Path,
    parts: Sequence[Part],
    num_samples: int,
    entries: Sequence[Entry],
    scoring: ScoringSettings,
    trained: Callable[[Entry], Mapping[str, Tensor]],
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Iterator[Scored]:
    """Yield each entry with its share of tokens routed otherwise, and how every metric of every sample is computed.

    Args:
        source: the parent.
        scratch: folder for hidden states; the caller removes it.
        parts: this process's batches.
        num_samples: number of sequences of all processes.
        entries: what is scored, in the order of the layers; at least one.
        scoring: depth and memory.
        trained: returns the trained tensors of an entry.
        sum_over_processes: returns the sum of a tensor over all processes.

    Raises:
        ValueError: too small a budget of memory or disk.
    """
    if scoring.depth == "layer":
        yield from layer_errors(source, scratch, parts, num_samples, entries, trained, sum_over_processes)
    elif isinstance(source, StreamedModel):
        streamed = StreamedScores(source, scratch, parts, num_samples, trained, scoring.memory, sum_over_processes)
        yield from streamed.values(entries)
    else:
        rmtree(scratch, ignore_errors=True)  # left by an interrupted run
        file = scratch / "entering"
        scorer = ReplaceOneBlock(source.model, parts, num_samples, scoring.memory, file, sum_over_processes)
        routed = Routed(source.model, [entry for entry in entries if changes_experts(entry)])
        scorer.start(entries[0].layer, routed)
        counted = routed.shares(sum_over_processes)
        for entry in entries:
            scorer.advance(entry.layer)
            yield entry, counted.get(entry, 0.0), partial(_values_of, scorer, entry, trained)


def _values_of(scorer: ReplaceOneBlock, entry: Entry, trained: Callable[[Entry], Mapping[str, Tensor]]) -> Values:
    return scorer.quality_loss(entry.block, trained(entry))
