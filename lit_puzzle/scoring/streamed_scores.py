"""Replace-1-block scores to the end of the model, of a parent that is read one layer at a time.

The states of the parent and of every candidate in flight are in mapped files (`lit_puzzle.model.state_files`): when
layer m is in memory, the candidates of m branch off from the parent, and those of earlier layers go through m. So one
pass over the layers scores all candidates; where their states would not fit on the disk, several passes do, each for
the next candidates, from their first layer on. Final states and metrics are those of
`lit_puzzle.scoring.replace_block`, to the same bits.

Resumable: files name the layer that their states enter, and a pass that was killed continues each of them.

Memory: that of `lit_puzzle.model.memory_budget`, the head where it is converted, and 7 x 4 n V bytes of metrics for
chunks of n tokens and V logits. Disk: (C + 5) T D b for C candidates in flight, T tokens, D channels of b bytes; at
most `Memory.disk_gib`. Bytes read in a pass: the layers from that of its first candidate on.
Source: arXiv 2602.11937 section 4.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor

from lit_puzzle.library.swap import swapped
from lit_puzzle.model.layer_pass import PARENT, LayerPass
from lit_puzzle.model.streaming import LayerSource
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.scoring.block_quality import ScoredTokens
from lit_puzzle.scoring.evidence import Routed, changes_experts
from lit_puzzle.scoring.footprint import metric_bytes
from lit_puzzle.scoring.hidden_states import bytes_of
from lit_puzzle.scoring.replace_block import Part, sample_values, scored_tokens
from lit_puzzle.scoring.score_files import Entry, Scored, Values
from lit_puzzle.scoring.settings import Memory

GIB = 2**30
COUNTS_FILE = "routed.json"  # in the folder of the states
OF_THE_PARENT = 5  # entering and leaving a layer, final, entering the next pass, and one file that is being written


class StreamedScores:
    """Scores of candidates, several at a time.

    Args:
        source: the parent.
        folder: where the states are kept; the caller removes it.
        parts: this process's batches.
        num_samples: number of sequences of all processes.
        trained: returns the trained tensors of an entry.
        memory: how much memory and disk may be used.
        sum_over_processes: returns the sum of a tensor over all processes.

    Raises:
        ValueError: the budget is too small for a layer and a batch, or the disk for the states of one candidate.
    """

    def __init__(
        self,
        source: LayerSource,
        folder: Path,
        parts: Sequence[Part],
        num_samples: int,
        trained: Callable[[Entry], Mapping[str, Tensor]],
        memory: Memory,
        sum_over_processes: Callable[[Tensor], Tensor],
    ) -> None:
        self.source, self.parts, self.num_samples = source, parts, num_samples
        self.trained, self.sum_over_processes = trained, sum_over_processes
        config = source.model.config
        self.chunk_tokens = memory.chunk_tokens(config.vocab_size, source.device.type)
        computing = metric_bytes(self.chunk_tokens, config.vocab_size)
        self.layers = LayerPass(source, folder, [part.batch for part in parts], computing)
        one = bytes_of(self.layers.states.tokens, config.hidden_size, source.model.dtype)
        self.at_once = int(memory.disk_gib * GIB // max(one, 1)) - OF_THE_PARENT
        if self.at_once < 1:
            raise ValueError(
                f"memory.disk_gib={memory.disk_gib:g} was given; the hidden states of one candidate need "
                f"{(OF_THE_PARENT + 1) * one / GIB:.2f} GiB. Raise it, or give fewer tokens."
            )

    def values(self, entries: Sequence[Entry]) -> Iterator[Scored]:
        """Yield each entry with its share of tokens routed otherwise, and how every metric of every sample is computed.

        Args:
            entries: in the order of their layers.
        """
        self.routed = Routed(self.source.model, [entry for entry in entries if changes_experts(entry)])
        self._restore_counts()
        for first in range(0, len(entries), self.at_once):
            group, later = entries[first : first + self.at_once], entries[first + self.at_once :]
            self._run(group, later[0].layer if later else None)
            counted = self.routed.shares(self.sum_over_processes)
            for entry in group:
                yield entry, counted.get(entry, 0.0), partial(self._values_of, entry)
                self.layers.states.remove(_name(entry))

    def _values_of(self, entry: Entry) -> Values:
        head, chunk = self.source.model.lm_head, self.chunk_tokens
        results = (self._results(_name(entry), index) for index in range(len(self.parts)))
        return sample_values(results, self.num_samples, head, chunk, self.sum_over_processes)

    def _restore_counts(self) -> None:
        """Set the counts of layers that the parent has passed in an interrupted run, and that of all tokens."""
        self.routed.counts[-1] = sum(int(part.batch["attention_mask"].sum()) for part in self.parts)
        file = self.layers.states.folder / COUNTS_FILE
        counts = read_json(file) if file.is_file() else {}
        for place, entry in enumerate(self.routed.removed):
            self.routed.counts[place] = counts.get(_name(entry), 0)

    def _save_counts(self) -> None:
        file = self.layers.states.folder / COUNTS_FILE
        counts = read_json(file) if file.is_file() else {}
        own = zip(map(_name, self.routed.removed), self.routed.counts.tolist()[:-1], strict=True)
        write_json(file, counts | dict(own))

    def _run(self, group: Sequence[Entry], next_layer: int | None) -> None:
        """Run the parent and the entries to the end, each from where it is.

        Args:
            group: the entries.
            next_layer: first layer of the next group, into which the parent's states are kept; None: there is none.
        """
        states, end = self.layers.states, self.layers.num_layers
        waiting = [entry.layer for entry in group if states.layer_of(_name(entry)) is None]
        needed = min(waiting, default=end)
        if not any(layer <= needed for layer in states.layers(PARENT)):
            self.layers.restart()
        keep = {end} | ({next_layer} if next_layer is not None else set())
        last = (
            max([*(layer + 1 for layer in waiting), *(keep - {end})], default=0) if states.has(PARENT, end) else end
        )  # that the parent enters
        begins = [max(layer for layer in states.layers(PARENT) if layer <= needed)]
        begins += [layer for entry in group if (layer := states.layer_of(_name(entry))) is not None]
        for layer, _ in self.source.layers(min(begins), end, self.layers.ahead):
            if states.has(PARENT, layer) and layer < last and not states.has(PARENT, layer + 1):
                self._parent_through(layer)
            for entry in group:
                name = _name(entry)
                if entry.layer == layer and states.layer_of(name) is None:
                    self._through(layer, PARENT, entry)
                elif states.has(name, layer):
                    self._through(layer, name)
                    states.remove(name, but=[layer + 1])
            if states.has(PARENT, layer) and layer < last:
                states.remove(PARENT, but=keep | {layer + 1})

    def _parent_through(self, layer: int) -> None:
        """Run all batches of the parent's states through its own layer, and keep the counts of its routing."""
        states = self.layers.states
        for place, entry in enumerate(self.routed.removed):
            if entry.layer == layer:
                self.routed.counts[place] = 0
        entering_ND = states.read(PARENT, layer)
        with states.write(PARENT, layer + 1) as leaving_ND:
            for index, part in enumerate(self.parts):
                with self.routed.counting_layer(layer, part.batch["attention_mask"]):
                    leaving_BTD = self.layers.through(layer, entering_ND, index)
                leaving_ND[self.layers.tokens(index)] = leaving_BTD.flatten(0, 1).cpu()
            self._save_counts()

    def _through(self, layer: int, name: str, branches: Entry | None = None) -> None:
        """Run all batches of one state through a layer, with an entry's block in its place if one branches off."""
        states, target = self.layers.states, name if branches is None else _name(branches)
        entering_ND = states.read(name, layer)
        swap: AbstractContextManager[None] = nullcontext()
        if branches is not None:
            swap = swapped(self.source.model, layer, branches.block, self.trained(branches))
        with swap, states.write(target, layer + 1) as leaving_ND:
            for index in range(len(self.parts)):
                leaving_BTD = self.layers.through(layer, entering_ND, index)
                leaving_ND[self.layers.tokens(index)] = leaving_BTD.flatten(0, 1).cpu()

    def _results(self, name: str, index: int) -> tuple[ScoredTokens, Tensor]:
        """Return the scored tokens of a batch and the final states of a candidate."""
        part = self.parts[index]
        scored_BT = part.batch["scored_mask"].bool()
        own_ND, child_ND = (self.layers.final(index, which, scored_BT) for which in (PARENT, name))
        return scored_tokens(part, own_ND), child_ND


def _name(entry: Entry) -> str:
    return entry.file_name.removesuffix(".json")
