"""Documents one by one, as sequences for a pass over a parent: which of them, how many tokens, how long at most.

Reads a folder of documents (`lit_puzzle.data.document_files`); writes nothing. Documents are drawn by seed until they
have as many tokens as are wanted; each is a sequence by itself, so that none attends another.

Memory: one shard and 17 bytes a document.
Shapes: D documents that pass the filter.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from lit_puzzle.data.document_files import DocumentFolder
from lit_puzzle.data.packing import Integers
from lit_puzzle.data.packing_settings import DocumentFilter
from lit_puzzle.data.shards import passing
from lit_puzzle.data.token_rows import TokenIds


@dataclass(frozen=True)
class DocumentSource:
    """Which documents are read.

    Args:
        folder: run folder of recipes/generate.yaml, or the folder of documents in it.
        filter: which documents count.
        tokens: documents are drawn until they have so many tokens; None: all of them.
        sequence_tokens: the end of a longer document is cut off; None: none may be longer than the parent's context.
        seed: of the draw.

    Raises:
        ValueError: no tokens, or sequences without room for a prompt and a completion.
    """

    folder: Path
    filter: DocumentFilter = field(default_factory=DocumentFilter)
    tokens: int | None = None
    sequence_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.tokens is not None and self.tokens < 1) or (
            self.sequence_tokens is not None and self.sequence_tokens < 2
        ):
            raise ValueError(
                f"documents: tokens {self.tokens}, sequence_tokens {self.sequence_tokens} were given; at least 1 and "
                "at least 2 are needed."
            )

    def open(self, parent: Path) -> DocumentFolder:
        """Return the folder, which a parent or one of its children can read.

        Raises:
            ValueError: it is missing or damaged, or of another parent.
        """
        folder = DocumentFolder(self.folder)
        folder.check_reader(parent, self.sequence_tokens or 1)
        if self.filter.written_by == "parent":
            folder.check_writer(parent)
        return folder

    def rows(self, folder: DocumentFolder) -> Iterator[tuple[TokenIds, int]]:
        """Yield token ids and prompt tokens of each drawn document, in the order of the folder.

        Raises:
            ValueError: no document passes the filter, or a shard is damaged.
        """
        drawn = self._draw(folder)
        edges = np.searchsorted(drawn, folder.first)
        for number, (begin, end) in enumerate(pairwise(edges.tolist())):
            if begin == end:
                continue
            shard = folder.shard(number)
            for document in (drawn[begin:end] - folder.first[number]).tolist():
                place = slice(shard.offsets[document], shard.offsets[document + 1])
                first_target = int(np.argmax(shard.mask_N[place]))
                yield shard.ids_N[place][: self.sequence_tokens], first_target

    def _draw(self, folder: DocumentFolder) -> Integers:
        """Return the numbers of the drawn documents, ascending."""
        numbers_D, lengths_D = self._passing(folder)
        if len(numbers_D) == 0:
            raise ValueError(
                f"No document is left: of the {len(folder)} in {folder.folder} none passes {self.filter} and has a "
                "target. Filter less, or generate more."
            )
        order_D = np.random.default_rng([self.seed, 2]).permutation(len(numbers_D))
        before_D = np.cumsum(lengths_D[order_D]) - lengths_D[order_D]
        wanted = len(numbers_D) if self.tokens is None else int(np.searchsorted(before_D, self.tokens))
        return np.sort(numbers_D[order_D[:wanted]])

    def _passing(self, folder: DocumentFolder) -> tuple[Integers, Integers]:
        """Return number and counted tokens of each document that passes the filter and has a target left."""
        numbers, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number in range(folder.num_shards):
            shard = folder.shard(number)
            targets_N = np.concatenate([[0], np.cumsum(shard.mask_N, dtype=np.int64)])
            lengths_D = np.diff(shard.offsets)
            if self.sequence_tokens is not None:
                lengths_D = np.minimum(lengths_D, self.sequence_tokens)
            begins_D = shard.offsets[:-1]
            has_target_D = targets_N[begins_D + lengths_D] > targets_N[begins_D]
            chosen = np.flatnonzero(passing(self.filter, shard) & has_target_D)
            numbers.append(chosen + folder.first[number])
            lengths.append(lengths_D[chosen])
        return np.concatenate(numbers), np.concatenate(lengths)
