"""Documents on disk: token ids with loss masks in Parquet shards, and what their folder says about itself.

A document is one prompt with its completion: `input_ids`, `loss_mask` (1: the token is a target, written by the
assistant), `environment`, `effort`, `correct` (verified answer: 1, 0, or null where there is nothing to verify). Shards
are `shard-00000.parquet`, ...; `documents.json` is written last and makes the folder complete: parent fingerprint, hash
of the tokenizer's vocabulary, sizes, counts per shard, settings. Documents are numbered in the order of the shards.

Any tool reads the shards: `datasets.load_dataset("parquet", data_files="FOLDER/*.parquet")`.

Memory: one shard, 5 bytes a token (9 while its Parquet is decoded). Disk: below 5 bytes a token (Parquet packs ids
into as many bits as they need).

Shapes: D documents of a shard, N their tokens laid end to end.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from lit_puzzle.data.document_record import read_record
from lit_puzzle.data.provenance import Provenance, read_limits
from lit_puzzle.data.shards import SCHEMA, Shard, read_shard
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.run.files import write_json
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.spec import Plan

DOCUMENTS_FILE = "documents.json"
PLAN_FILE = "plan.json"  # of a child
NOTE = "lit_puzzle"


@dataclass(frozen=True)
class Document:
    """One prompt with its completion; `loss_mask` is 1 on the tokens of the completion."""

    input_ids: list[int]
    loss_mask: list[int]
    environment: str
    effort: str
    correct: float | None = None


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.parquet"


def write_shard(folder: Path, number: int, documents: Sequence[Document], note: str = "") -> None:
    """Write one shard, with a note in the file's metadata; it appears whole or not at all."""
    table = pyarrow.Table.from_pylist([vars(document) for document in documents], schema=SCHEMA)
    table = table.replace_schema_metadata({NOTE: note})
    target = folder / shard_name(number)
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("wb") as stream:
        parquet.write_table(table, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(target)


def read_note(path: Path) -> str:
    """Return the note of one shard."""
    return str(parquet.read_schema(path).metadata[NOTE.encode()].decode())


def write_documents(
    folder: Path, documents: Iterable[Document], parent: Path, shard_documents: int = 4096, **settings: Any
) -> dict[str, Any]:
    """Write a whole folder: documents of your own for a parent.

    Args:
        folder: Is made if it is not there.
        documents: In the order in which they are numbered.
        parent: Checkpoint folder whose tokenizer made the token ids.
        shard_documents: Documents of a shard.
        **settings: Noted in `documents.json`.

    Returns:
        What `documents.json` holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left, number = iter(documents), 0
    while batch := list(islice(left, shard_documents)):
        write_shard(folder, number, batch)
        number += 1
    return close_folder(folder, Provenance.of(parent), number, settings)


def close_folder(folder: Path, writer: Provenance, shards: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check and count the shards, and write `documents.json`, which makes the folder complete.

    Raises:
        ValueError: A shard holds what no reader would take.
    """
    rows: list[dict[str, Any]] = []
    efforts = Counter[str]()
    for number in range(shards):
        shard = read_shard(folder / shard_name(number), writer.vocab_size, writer.context_tokens)
        rows.append(_count(shard))
        efforts.update(shard.efforts)
    totals = {key: sum(row[key] for row in rows) for key in ("documents", "tokens", "targets")}
    counts = {"efforts": dict(sorted(efforts.items())), "shards": rows, "settings": dict(settings)}
    record = asdict(writer) | totals | counts
    write_json(folder / DOCUMENTS_FILE, record)
    return record


def _count(shard: Shard) -> dict[str, Any]:
    content = hashlib.sha256()
    for array in (shard.offsets, shard.ids_N, shard.mask_N):
        content.update(np.ascontiguousarray(array).data)
    labels = json.dumps([shard.environments, shard.efforts, shard.correct])
    return {
        "documents": len(shard),
        "tokens": len(shard.ids_N),
        "targets": int(shard.mask_N.sum()),
        "longest": int(np.diff(shard.offsets).max(initial=0)),
        "sha256": content.hexdigest(),
        "labels_sha256": hashlib.sha256(labels.encode()).hexdigest(),
    }


def documents_identity(folder: Path, shards: int) -> Identity:
    """Return the identity of a folder of documents with so many shards."""
    return file_identity(folder, [DOCUMENTS_FILE, *map(shard_name, range(shards))])


class DocumentFolder:
    """A complete folder of documents.

    Attributes:
        folder: Where it lies.
        record: What its `documents.json` says.
        writer: Whose token ids they are.
        identity: Sha256 of `documents.json`, which holds that of every shard's tokens.
        first: Number of the first document of each shard, and at the end the number of documents.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            ValueError: It is missing, its run has not finished, its record is damaged, or shards are missing.
        """
        self.folder = require_input(folder, "folder of documents", DOCUMENTS_FILE)
        self.record = read_record(self.folder / DOCUMENTS_FILE)
        self.identity = hashlib.sha256((self.folder / DOCUMENTS_FILE).read_bytes()).hexdigest()
        self.writer = Provenance(**{key: self.record[key] for key in Provenance.__dataclass_fields__})
        self.first = [0, *accumulate(row["documents"] for row in self.record["shards"])]
        missing = [shard_name(n) for n in range(self.num_shards) if not (self.folder / shard_name(n)).is_file()]
        if missing:
            raise ValueError(f"{self.folder}: {missing[0]} is missing ({len(missing)} in all). Make the folder again.")

    def __len__(self) -> int:
        return self.first[-1]

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.first) - 1

    def input_identity(self) -> Identity:
        """Return the identity of the folder: its record and its shards."""
        return documents_identity(self.folder, self.num_shards)

    def shard(self, number: int) -> Shard:
        """Return the documents of one shard, checked.

        Raises:
            ValueError: It cannot be read, or is not the shard that `documents.json` was written for.
        """
        path, expected = self.folder / shard_name(number), self.record["shards"][number]
        shard = read_shard(path, self.writer.vocab_size, self.writer.context_tokens)
        if len(shard) != expected["documents"]:
            raise ValueError(f"{path} has {len(shard)} documents, {DOCUMENTS_FILE} says {expected['documents']}.")
        found = _count(shard)
        for key, what in (("sha256", "tokens"), ("labels_sha256", "labels")):
            if found[key] != expected.get(key, found[key]):  # older records have none
                raise ValueError(
                    f"{path} is not the shard of {DOCUMENTS_FILE}: the SHA-256 of its {what} is {found[key][:12]}, "
                    f"recorded is {expected[key][:12]}. Put the former shard back, or make the folder again."
                )
        return shard

    def check_shards(self, numbers: Iterable[int]) -> None:
        """Read some shards and keep none.

        Raises:
            ValueError: One of them cannot be read, or is not the one that was written.
        """
        for number in numbers:
            self.shard(number)

    def check_parent(self, parent: Path, sequence_tokens: int) -> None:
        """Check a parent like any reader, and warn if another model wrote the documents.

        Raises:
            ValueError: as `check_reader`.
        """
        self.check_reader(parent, sequence_tokens)
        if self.writer.fingerprint != (own := fingerprint(parent)):
            warnings.warn(
                f"{self.folder} was written by the model {self.writer.fingerprint[:12]}, not by the parent {parent} "
                f"({own[:12]}): what is learned is the parent's behavior on texts of another model. That is right for "
                "worked solutions or a copy of the parent in another precision.",
                stacklevel=2,
            )

    def check_reader(self, parent: Path, sequence_tokens: int) -> None:
        """Refuses a parent (or child) to which these token ids mean something else, or sequences it cannot hold.

        Raises:
            ValueError: Its tokenizer or the size of its vocabulary differs, or its context is shorter.
        """
        tokenizer, vocab_size, context_tokens = read_limits(require_input(parent, "parent checkpoint", "config.json"))
        for what, written, read in (
            ("vocabulary of", self.writer.vocab_size, vocab_size),
            ("tokenizer", self.writer.tokenizer[:12], tokenizer[:12]),
        ):
            if written != read:
                raise ValueError(
                    f"{self.folder} was written with {what} {written}, {parent} has {read}: token ids would mean "
                    "something else. Generate documents with this parent."
                )
        if sequence_tokens > context_tokens:
            raise ValueError(
                f"Sequences of {sequence_tokens} tokens were asked for; the context of {parent} holds "
                f"{context_tokens}. Ask for shorter ones."
            )

    def check_writer(self, checkpoint: Path) -> None:
        """Refuse documents of another parent: a pass over them would measure what this one does not write.

        Args:
            checkpoint: folder of the parent, or of a child, whose plan.json names its parent.

        Raises:
            ValueError: another model wrote them.
        """
        checkpoint = require_input(checkpoint, "checkpoint", "config.json")
        own = fingerprint(checkpoint)
        plan = checkpoint / PLAN_FILE
        parent = Plan.load(plan).parent_fingerprint if plan.is_file() else own
        if self.writer.fingerprint not in (own, parent):
            raise ValueError(
                f"{self.folder} has documents of another parent (fingerprint {self.writer.fingerprint[:12]}) than "
                f"{checkpoint} ({parent[:12]}). Generate documents with this parent (recipes/generate.yaml), or take "
                "those of any model with the same tokenizer: filter.written_by: any."
            )
