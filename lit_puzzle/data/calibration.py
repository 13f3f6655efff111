"""Calibration data: sequences like those the parent itself generates, as padded batches for one pass under `validate`.

Reads documents that `recipes/generate.yaml` has written; or a JSON lines file (`lit_puzzle.data.sequence_file`); or
chooses prompts, generates the parent's completions at a mix of efforts, and writes `calibration.jsonl` (`input_ids`,
`prompt_tokens`, `environment`, `effort`) into the run folder: the same form, so that other runs can read it. Writes
`calibration_tokens/` there (`lit_puzzle.data.token_rows`), once, on the first process; all processes map it.
Source: arXiv 2602.11937 section 2: "data compatible with the parent's distribution is very important". The paper packs
sequences; here each document is a sequence by itself, so that none attends another, and `batch_tokens` makes batches of
many short ones or few long ones.

Generating here holds the parent whole on one process. For a parent that needs several GPUs, generate before, with
`recipes/generate.yaml`, and give `documents`.

Batches: rank r of R takes batches r, r + R, ...; a rank that has one less gets the last batch once more with nothing
marked as scored: every rank runs the same number of forward passes (sharded weights need that), no token counts twice.

Shapes: B sequences of a batch, T tokens of the longest.

Memory: 24 bytes a sequence + 24 bytes a token of one batch; the tokens themselves are mapped; while generating, the
parent and the KV cache of one batch. Disk: 4 bytes a token; with `calibration.jsonl` about 10.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lightning import LightningDataModule
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader, IterableDataset

from lit_puzzle.data.batches import PaddedBatch
from lit_puzzle.data.document_source import DocumentSource
from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.data.prompts import check_lengths, choose, encode, prompts_identity
from lit_puzzle.data.sequence_file import sequences_of
from lit_puzzle.data.token_rows import RowBatches, TokenRows, write_token_rows
from lit_puzzle.generation.load import load_engine
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.model.chat import fix_date
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.run.files import write_atomically
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.inputs import run_date

CALIBRATION_FILE = "calibration.jsonl"
TOKENS_FOLDER = "calibration_tokens"


class CalibrationData(LightningDataModule):
    """Sequences for one pass over a parent: its documents, those of a file, or prompts with its completions.

    Args:
        parent: checkpoint folder: its tokenizer, its limits, and the model that generates.
        prompts: which prompts, and at which efforts. Training problems only, never held-out ones.
        sequences: JSON lines file of `{"input_ids": [...]}` or `{"text": "..."}`; nothing is generated then.
        documents: documents that the parent has generated; nothing is generated then.
        sampling: how completions are drawn.
        engine: what runs the parent while it generates.
        batch_size: sequences in one batch of the pass.
        batch_tokens: tokens of a batch at most, padding included (but at least one sequence); None: no limit.

    Raises:
        ValueError: no source or two files, no sequences in a batch, or documents that the parent cannot read or has not
            written.
    """

    def __init__(
        self,
        parent: Path,
        prompts: PromptSource | None = None,
        sequences: Path | None = None,
        documents: DocumentSource | None = None,
        sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008  (frozen)
        engine: EngineSettings = EngineSettings(name="transformers", batch_size=96),  # noqa: B008
        batch_size: int = 32,
        batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if prompts is None and sequences is None and documents is None:
            raise ValueError("Give CalibrationData documents of the parent, prompts, or a file of sequences.")
        if sequences is not None and documents is not None:
            raise ValueError(f"CalibrationData: {sequences} and {documents.folder} were given; give one of the two.")
        sampling.refuse_logprobs("CalibrationData")
        if batch_size < 1 or (batch_tokens is not None and batch_tokens < 1):
            given = f"batch_size {batch_size}" + ("" if batch_tokens is None else f", batch_tokens {batch_tokens}")
            raise ValueError(f"{given} was given; 1 or more is needed.")
        self.parent = require_input(parent, "parent checkpoint", "config.json")
        self.prompts = prompts
        self.sequences = None if sequences is None else Path(sequences)
        self.documents = documents
        self.document_folder = None if documents is None else documents.open(self.parent)
        self.sampling, self.engine = sampling, engine
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.prepare_data_per_node = False  # the run folder is shared by all nodes

    def input_identities(self) -> dict[str, Identity]:
        """Return the identities of the parent, and of the documents, the sequences or the prompts that it completes."""
        parent = {"data.parent": checkpoint_identity(self.parent)}
        if self.document_folder is not None:
            return parent | {"data.documents": self.document_folder.input_identity()}
        if self.sequences is not None:
            return parent | {"data.sequences": file_identity(require_input(self.sequences, "calibration data"))}
        assert self.prompts is not None
        return parent | {"data.prompts": prompts_identity(self.prompts, choose(self.prompts))}

    def prepare_data(self) -> None:
        """Write the sequences (first process only)."""
        assert self.trainer is not None
        self.write_sequences(Path(self.trainer.default_root_dir), str(self.trainer.strategy.root_device))

    def write_sequences(self, folder: Path, device: str) -> None:
        """Write `calibration_tokens/`; `calibration.jsonl` before, where the parent generates and it is not there yet.

        Args:
            folder: where.
            device: where the parent generates.

        Raises:
            ValueError: sequences that the parent cannot read.
        """
        if self.document_folder is not None:
            assert self.documents is not None
            write_token_rows(folder / TOKENS_FOLDER, self.documents.rows(self.document_folder))
            return
        if self.sequences is None and not (folder / CALIBRATION_FILE).is_file():
            self._generate(folder, device)
        file = folder / CALIBRATION_FILE
        if self.sequences is not None:
            file = require_input(self.sequences, "calibration data")
        write_token_rows(folder / TOKENS_FOLDER, sequences_of(file, self.parent))

    def _generate(self, folder: Path, device: str) -> None:
        assert self.prompts is not None
        pairs = choose(self.prompts)
        tokenizer = load_tokenizer(self.parent)
        fix_date(tokenizer, run_date(folder))
        check_lengths(tokenizer, pairs, self.parent, self.sampling.max_new_tokens)
        prompts = encode(tokenizer, pairs)
        completions = load_engine(self.engine, self.parent, device).generate(prompts, self.sampling)
        lines = []
        for (problem, effort), prompt, completion in zip(pairs, prompts, completions, strict=True):
            origin = {"prompt_tokens": len(prompt), "environment": problem.environment, "effort": effort}
            lines.append(json.dumps({"input_ids": [*prompt, *completion.token_ids], **origin}) + "\n")
        write_atomically(folder / CALIBRATION_FILE, "".join(lines))

    def setup(self, stage: str) -> None:
        """Map the sequences, on every process."""
        assert self.trainer is not None
        self.batches = self.read_batches(Path(self.trainer.default_root_dir))

    def read_batches(self, folder: Path) -> RowBatches:
        """Return the batches of all processes, the longest sequences first: too little memory shows at once.

        Args:
            folder: where `write_sequences` wrote.
        """
        return RowBatches(TokenRows(folder / TOKENS_FOLDER), self.batch_size, self.batch_tokens)

    def prompt_lengths(self, folder: Path) -> list[list[int]]:
        """Return how many tokens of each sequence of `read_batches(folder)` the parent was given; 0: not known."""
        return self.read_batches(folder).prompt_lengths()

    def val_dataloader(self) -> DataLoader[PaddedBatch]:
        """Return this process's batches."""
        assert self.trainer is not None
        share = RankBatches(self.batches, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(share, batch_size=None)


class RankBatches(IterableDataset[PaddedBatch]):
    """One rank's padded batches, the same number on every rank; iterable, so that Lightning adds no sampler."""

    def __init__(self, batches: Sequence[Sequence[ArrayLike]], rank: int, world_size: int) -> None:
        self.batches = batches
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-len(self.batches) // self.world_size)

    def __iter__(self) -> Iterator[PaddedBatch]:
        for index in range(self.rank, len(self) * self.world_size, self.world_size):
            batch = pad_right(self.batches[min(index, len(self.batches) - 1)])
            if index >= len(self.batches):
                batch["scored_mask"].zero_()
            yield batch


def pad_right(rows: Sequence[ArrayLike]) -> PaddedBatch:
    """Token ids -> `input_ids`, `attention_mask` (1 on tokens) and `scored_mask` (True on tokens), each (B, T)."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    lengths_B = torch.tensor([len(row) for row in tensors])
    mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    ids_BT = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "scored_mask": mask_BT}
