"""Parent-written documents as packed batches for training and validation: a data module that resumes anywhere.

Reads a folder of documents (`lit_puzzle.data.document_files`); writes `packed/` into the run folder, once, on the first
process: the packed sequences of both splits and `packed.json` (settings and statistics).

Order: the documents are shuffled by seed and packed; each epoch shuffles the sequences by (seed, epoch). Step s of an
epoch is the sequences [s G : (s + 1) G] of that order, G = batch_size * processes, and rank r has its r-th part: which
sequences meet in a step does not depend on how many processes share them, and every rank has equally many batches. The
incomplete last step of an epoch is left out; validation fills it up with rows of padding that hold no target. With
accumulated gradients an epoch may end inside an update, which is then smaller: its batches still count 1 / accumulated.

Validation split: by the crc32 of a document's prompt (the tokens before its first target), so that other answers to
the same prompt stay on the same side.

Memory: 160 bytes a document and one shard while packing (one process), then one batch. Disk: 5 bytes a place + 32 bytes
a document.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning import LightningDataModule
from numpy.typing import NDArray

from lit_puzzle.data.document_files import DocumentFolder, Shard
from lit_puzzle.data.packed_files import NOTHING, Batch, PackedSequences, write_packed
from lit_puzzle.data.packing import Integers, PackingName
from lit_puzzle.model.safetensors_file import read_json
from lit_puzzle.model.writer import atomic_folder

PACKED_FILE = "packed.json"


@dataclass(frozen=True)
class Filter:
    """Which documents count; None: all."""

    efforts: list[str] | None = None
    environments: list[str] | None = None
    only_correct: bool = False

    def keeps(self, shard: Shard) -> NDArray[np.bool_]:
        """For each document of a shard whether it counts."""
        return np.array(
            [
                (self.efforts is None or effort in self.efforts)
                and (self.environments is None or environment in self.environments)
                and (not self.only_correct or correct == 1.0)
                for environment, effort, correct in zip(shard.environments, shard.efforts, shard.correct, strict=True)
            ],
            dtype=np.bool_,
        )


class PackedDocuments(LightningDataModule):
    """Packed batches of parent-written documents.

    Args:
        documents: Folder of documents (`documents.json` and its shards).
        parent: Checkpoint folder of the model that reads them; its tokenizer must be theirs.
        sequence_tokens: Length of a packed sequence; at most the parent's context.
        batch_size: Sequences of a batch on one process.
        packing: `first_fit` wastes less; `sequential` keeps the shuffled order.
        long_documents: `refuse` documents longer than a sequence, or `cut` off what does not fit.
        validation_one_in: One prompt in so many is for validation; 0: none.
        efforts: Only documents of these efforts.
        environments: Only documents of these environments.
        only_correct: Only documents with a verified right answer.
        seed: Of all shuffling.

    Attributes:
        statistics: After `setup`: per split (`train/...`, `validation/...`) sequences, documents, tokens, targets and
            efficiency, and `cut_tokens`.
    """

    def __init__(
        self,
        documents: Path,
        parent: Path,
        sequence_tokens: int,
        batch_size: int = 1,
        packing: PackingName = "first_fit",
        long_documents: Literal["refuse", "cut"] = "refuse",
        validation_one_in: int = 16,
        efforts: list[str] | None = None,
        environments: list[str] | None = None,
        only_correct: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if sequence_tokens < 2 or batch_size < 1 or validation_one_in < 0 or validation_one_in == 1:
            raise ValueError(
                f"sequence_tokens {sequence_tokens}, batch_size {batch_size}, validation_one_in {validation_one_in} "
                "were given; at least 2, at least 1, and 0 (none) or at least 2 are needed."
            )
        self.folder = DocumentFolder(documents)
        self.folder.check_reader(parent, sequence_tokens)
        self.sequence_tokens, self.batch_size, self.packing = sequence_tokens, batch_size, packing
        self.long_documents, self.validation_one_in, self.seed = long_documents, validation_one_in, seed
        self.filter = Filter(efforts, environments, only_correct)
        self.statistics: dict[str, float] = {}
        self.prepare_data_per_node = False  # the run folder is shared by all nodes

    @property
    def _packed(self) -> Path:
        assert self.trainer is not None
        return Path(self.trainer.default_root_dir) / "packed"

    def _settings(self) -> dict[str, Any]:
        """All that the packed files depend on."""
        own = {name: vars(self)[name] for name in ("sequence_tokens", "packing", "long_documents", "seed")}
        split = {"validation_one_in": self.validation_one_in, "documents": self.folder.identity}
        return own | vars(self.filter) | split

    def prepare_data(self) -> None:
        """Packs both splits into the run folder (first process only), unless that was done.

        Raises:
            ValueError: No document is left after filtering, in training or in validation, or one is too long.
        """
        if (self._packed / PACKED_FILE).is_file() and self._read_packed()["settings"] == self._settings():
            return
        numbers, lengths, held_out, cut_tokens = self._choose()
        shuffled = np.random.default_rng([self.seed, 0]).permutation(len(numbers))
        statistics: dict[str, float] = {"cut_tokens": cut_tokens}
        with atomic_folder(self._packed, replace=True) as scratch:
            for name in ("train", "validation") if self.validation_one_in else ("train",):
                order = shuffled[held_out[shuffled] == (name == "validation")]
                if len(order) == 0:
                    raise ValueError(self._empty(name, len(numbers)))
                arguments = numbers[order], lengths[order], self.sequence_tokens, self.packing
                made = write_packed(scratch / name, self.folder, *arguments)
                statistics |= {f"{name}/{key}": value for key, value in made.items()}
            content = {"settings": self._settings(), "statistics": statistics}
            (scratch / PACKED_FILE).write_text(json.dumps(content, indent=1) + "\n")

    def _read_packed(self) -> dict[str, Any]:
        return read_json(self._packed / PACKED_FILE)

    def _choose(self) -> tuple[Integers, Integers, NDArray[np.bool_], int]:
        """Number, tokens that count and split of every document that passes the filter; tokens that are cut off."""
        numbers: list[int] = []
        lengths: list[int] = []
        held_out: list[bool] = []
        cut_tokens = 0
        for shard_number in range(self.folder.num_shards):
            shard = self.folder.shard(shard_number)
            for d in np.flatnonzero(self.filter.keeps(shard)).tolist():
                begin, end = shard.offsets[d], shard.offsets[d + 1]
                number, length = self.folder.first[shard_number] + d, int(end - begin)
                if length > self.sequence_tokens and self.long_documents == "refuse":
                    raise ValueError(
                        f"{self.folder.folder}: document {number} has {length} tokens, a sequence holds "
                        f"{self.sequence_tokens}. Give longer sequences, or long_documents: cut."
                    )
                targets = np.flatnonzero(shard.mask_N[begin : begin + self.sequence_tokens][:length])
                if len(targets) == 0:  # nothing to learn from: the answer is empty or cut off whole
                    continue
                prompt = shard.ids_N[begin : begin + targets[0]].tobytes()
                numbers.append(number)
                lengths.append(min(length, self.sequence_tokens))
                held_out.append(self.validation_one_in > 0 and zlib.crc32(prompt) % self.validation_one_in == 0)
                cut_tokens += length - lengths[-1]
        if not numbers:
            raise ValueError(self._empty("train", 0))
        return np.array(numbers), np.array(lengths), np.array(held_out), cut_tokens

    def _empty(self, split: str, left: int) -> str:
        return (
            f"No document is left for {split}: {self.folder.folder} has {len(self.folder)}, {left} of them pass "
            f"{self.filter} and have a target. Filter less, generate more, or change validation_one_in "
            f"({self.validation_one_in})."
        )

    def setup(self, stage: str) -> None:
        """Maps the packed files, on every process.

        Raises:
            ValueError: There are fewer training sequences than one step of all processes needs.
        """
        assert self.trainer is not None
        self.statistics = self._read_packed()["statistics"]
        self._train = PackedSequences(self._packed / "train")
        self._validation = PackedSequences(self._packed / "validation") if self.validation_one_in else None
        step = self.batch_size * self.trainer.world_size
        if len(self._train) < step:
            raise ValueError(
                f"{len(self._train)} training sequences of {self.sequence_tokens} tokens are fewer than batch_size "
                f"{self.batch_size} x {self.trainer.world_size} processes. Generate more, or pack shorter sequences."
            )

    def train_dataloader(self) -> "TrainBatches":
        """This process's batches of an epoch, from where a resumed run stopped."""
        assert self.trainer is not None
        return TrainBatches(self._train, self.batch_size, self.trainer.global_rank, self.trainer.world_size, self.seed)

    def val_dataloader(self) -> "ValidationBatches | list[Any]":
        """This process's share of the validation sequences."""
        assert self.trainer is not None
        if self._validation is None:
            return []
        return ValidationBatches(self._validation, self.batch_size, self.trainer.global_rank, self.trainer.world_size)


class TrainBatches:
    """One rank's training batches; iterating continues after `consumed` sequences (of all ranks, since the start)."""

    def __init__(self, sequences: PackedSequences, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.sequences, self.batch_size, self.rank, self.seed = sequences, batch_size, rank, seed
        self.step = batch_size * world_size
        self.consumed = 0

    def __len__(self) -> int:
        return len(self.sequences) // self.step

    def __iter__(self) -> Iterator[Batch]:
        """What is left of an epoch; `consumed` is read when the first batch is asked for, not before."""
        epoch, offset = divmod(self.consumed // self.step, len(self))
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.sequences))
        for step in range(offset, len(self)):
            begin = step * self.step + self.rank * self.batch_size
            self.consumed += self.step
            yield self.sequences.batch(order[begin : begin + self.batch_size].tolist())

    def state_dict(self) -> dict[str, int]:
        """The same on all ranks."""
        return {"consumed": self.consumed, "step": self.step, "sequences": len(self.sequences)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a saved position, also with another number of processes.

        Raises:
            ValueError: Another number of sequences in all, or in a step: it would be another order.
        """
        if (state["step"], state["sequences"]) != (self.step, len(self.sequences)):
            raise ValueError(
                f"The checkpoint was made with {state['step']} sequences a step of {state['sequences']} in all; now "
                f"they are {self.step} of {len(self.sequences)}. Resume with the same data and batch_size x processes."
            )
        self.consumed = state["consumed"]


class ValidationBatches:
    """One rank's validation batches: every sequence once over all ranks; rows of padding even the ranks out."""

    def __init__(self, sequences: PackedSequences, batch_size: int, rank: int, world_size: int) -> None:
        self.sequences, self.batch_size, self.rank = sequences, batch_size, rank
        self.step = batch_size * world_size

    def __len__(self) -> int:
        return -(-len(self.sequences) // self.step)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            begin = step * self.step + self.rank * self.batch_size
            rows = range(begin, begin + self.batch_size)
            yield self.sequences.batch([row if row < len(self.sequences) else NOTHING for row in rows])
