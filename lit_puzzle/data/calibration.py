"""Calibration data: sequences like those the parent itself generates, as padded batches for one pass under `validate`.

Reads either a JSON lines file, each line `{"input_ids": [...]}` or `{"text": "..."}`, or chooses prompts, generates the
parent's completions at a mix of efforts, and writes `calibration.jsonl` (`input_ids`, `prompt_tokens`, `environment`,
`effort`) into the run folder: the same form, so that later stages and other runs can read it.
Source: arXiv 2602.11937 section 2: "data compatible with the parent's distribution is very important".

Generating here holds the parent whole on one process. For a parent that needs several GPUs, generate before, with
`recipes/generate.yaml` or a serving engine, and give the sequences as a file.

Batches: rank r of R takes batches r, r + R, ...; a rank that has one less gets the last batch once more with nothing
marked as scored: every rank runs the same number of forward passes (sharded weights need that), no token counts twice.

Shapes: B sequences of a batch, T tokens of the longest.

Memory: up to 36 bytes a token of all sequences (lists of Python integers) + 24 bytes a token of one batch; while
generating, the parent and the KV cache of one batch. Disk: about 6 bytes a token.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from lit_puzzle.data.batches import PaddedBatch
from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.data.prompts import check_lengths, choose, encode, prompts_identity
from lit_puzzle.generation.load import load_engine
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.model.chat import fix_date
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.opening import load_config, load_tokenizer
from lit_puzzle.model.tokens import token_ids
from lit_puzzle.run.files import write_atomically
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import Identity, file_identity, run_date
from lit_puzzle.run.json_lines import read_json_lines

CALIBRATION_FILE = "calibration.jsonl"


class CalibrationData(LightningDataModule):
    """Sequences for one pass over a parent: those of a file, or prompts with completions of the parent.

    Args:
        parent: checkpoint folder: its tokenizer, its limits, and the model that generates.
        prompts: which prompts, and at which efforts. Training problems only, never held-out ones.
        sequences: JSON lines file of `{"input_ids": [...]}` or `{"text": "..."}`; nothing is generated then.
        sampling: how completions are drawn.
        engine: what runs the parent while it generates.
        batch_size: sequences in one batch of the pass.

    Raises:
        ValueError: neither prompts nor sequences, or no sequences in a batch.
    """

    def __init__(
        self,
        parent: Path,
        prompts: PromptSource | None = None,
        sequences: Path | None = None,
        sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008  (frozen)
        engine: EngineSettings = EngineSettings(name="transformers", batch_size=96),  # noqa: B008
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        if prompts is None and sequences is None:
            raise ValueError("Give CalibrationData prompts, which the parent completes, or a file of sequences.")
        sampling.refuse_logprobs("CalibrationData")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} was given; 1 or more is needed.")
        self.parent = require_input(parent, "parent checkpoint", "config.json")
        self.prompts = prompts
        self.sequences = None if sequences is None else Path(sequences)
        self.sampling = sampling
        self.engine = engine
        self.batch_size = batch_size
        self.prepare_data_per_node = False  # the run folder is shared by all nodes

    def input_identities(self) -> dict[str, Identity]:
        """Return the identities of the parent, and of the sequences or the prompts that it completes."""
        parent = {"data.parent": checkpoint_identity(self.parent)}
        if self.sequences is not None:
            return parent | {"data.sequences": file_identity(require_input(self.sequences, "calibration data"))}
        assert self.prompts is not None
        return parent | {"data.prompts": prompts_identity(self.prompts, choose(self.prompts))}

    def prepare_data(self) -> None:
        """Generate the sequences (first process only) and write `calibration.jsonl`."""
        assert self.trainer is not None
        self.write_sequences(Path(self.trainer.default_root_dir), str(self.trainer.strategy.root_device))

    def write_sequences(self, folder: Path, device: str) -> None:
        """Generate the sequences on a device and write `calibration.jsonl`; nothing for a given file."""
        if self.sequences is not None or self.prompts is None:
            return
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
        """Read and check the sequences, on every process."""
        assert self.trainer is not None
        self.batches = self.read_batches(Path(self.trainer.default_root_dir))

    def read_batches(self, folder: Path) -> list[list[list[int]]]:
        """Return the batches of all processes.

        Args:
            folder: Where `write_sequences` wrote, if the sequences were generated.

        Raises:
            ValueError: Sequences the parent cannot read.
        """
        file = self._file(folder)
        config = load_config(self.parent)
        rows = read_sequences(file, self.parent)
        check_sequences(rows, file, config.vocab_size, config.max_position_embeddings)
        rows.sort(key=len, reverse=True)  # stable; the longest batch first, so that too little memory shows at once
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def prompt_lengths(self, folder: Path) -> list[list[int]]:
        """How many tokens of each sequence of `read_batches(folder)` the parent was given; 0 where the file is silent.

        Raises:
            ValueError: Not fewer than the sequence has.
        """
        file = self._file(folder)
        rows, prompts = read_sequences(file, self.parent), read_prompt_lengths(file)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]), reverse=True)  # stable, as `read_batches`
        ordered = [prompts[place] for place in order]
        return [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]

    def _file(self, folder: Path) -> Path:
        written = folder / CALIBRATION_FILE
        return written if self.sequences is None else require_input(self.sequences, "calibration data")

    def val_dataloader(self) -> DataLoader[PaddedBatch]:
        """Return this process's batches."""
        assert self.trainer is not None
        share = RankBatches(self.batches, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(share, batch_size=None)


class RankBatches(IterableDataset[PaddedBatch]):
    """One rank's padded batches, the same number on every rank; iterable, so that Lightning adds no sampler."""

    def __init__(self, batches: Sequence[Sequence[Sequence[int]]], rank: int, world_size: int) -> None:
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


def pad_right(rows: Sequence[Sequence[int]]) -> PaddedBatch:
    """Token lists -> `input_ids`, `attention_mask` (1 on tokens) and `scored_mask` (True on tokens), each (B, T)."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    lengths_B = torch.tensor([len(row) for row in rows])
    mask_BT = torch.arange(longest) < lengths_B[:, None]
    return {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "scored_mask": mask_BT}


def read_sequences(file: Path, parent: Path) -> list[list[int]]:
    """Token lists of a JSON lines file; texts are tokenized as they stand (no special tokens added).

    Raises:
        ValueError: The file cannot be read, a line is not of either form, a prompt is not shorter than its sequence, or
            there is none.
    """
    rows: list[list[int]] = []
    tokenizer: PreTrainedTokenizerBase | None = None
    for place, value in read_json_lines(file):
        row = _checked(value, place)
        if isinstance(row, str):
            tokenizer = tokenizer or load_tokenizer(parent)
            row = token_ids(tokenizer, row)
        prompt = _prompt_tokens(value, place)
        if row and not 0 <= prompt < len(row):
            raise ValueError(
                f"{place}: the sequence has {len(row)} tokens, prompt_tokens is {prompt}; it must be below that."
            )
        rows.append(row)
    if not rows:
        raise ValueError(f'{file} holds no sequence. Give one {{"input_ids": [...]}} or {{"text": "..."}} per line.')
    return rows


def read_prompt_lengths(file: Path) -> list[int]:
    """`prompt_tokens` of each sequence of a file that `read_sequences` reads, 0 where there is none.

    Raises:
        ValueError: The file cannot be read, or a line is of another form.
    """
    lengths = []
    for place, value in read_json_lines(file):
        _checked(value, place)
        lengths.append(_prompt_tokens(value, place))
    return lengths


def _prompt_tokens(data: Mapping[str, Any], place: str) -> int:
    length = data.get("prompt_tokens", 0)
    if type(length) is not int:
        raise ValueError(f"{place}: prompt_tokens must be a whole number, got {length!r}.")
    return length


def _checked(data: Any, place: str) -> list[int] | str:
    form = 'one JSON object per line, {"input_ids": [1, 2, ...]} or {"text": "..."}'
    if not isinstance(data, Mapping) or ("input_ids" in data) == ("text" in data):
        raise ValueError(f"{place}: {str(data)[:80]!r} is not of the form {form}.")
    unknown = sorted(set(data) - {"input_ids", "text", "prompt_tokens", "environment", "effort"})
    if unknown:
        raise ValueError(f"{place}: the keys {unknown} have no use; the form is {form}. Take them out.")
    if "text" in data:
        if not isinstance(data["text"], str) or not data["text"]:
            raise ValueError(f"{place}: text must be a non-empty text, got {data['text']!r}.")
        return data["text"]
    ids = data["input_ids"]
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise ValueError(f"{place}: input_ids must be a non-empty list of whole numbers, got {str(ids)[:80]}.")
    return ids


def check_sequences(rows: Sequence[Sequence[int]], file: Path, vocab_size: int, context_tokens: int) -> None:
    """Refuses sequences the parent cannot read, before it is loaded.

    Raises:
        ValueError: Longer than the context, or token ids outside the vocabulary; names the sequence.
    """
    for number, row in enumerate(rows, 1):
        if len(row) > context_tokens:
            raise ValueError(
                f"{file}: sequence {number} has {len(row)} tokens; the parent's context holds {context_tokens}. Cut it."
            )
        if not row or min(row) < 0 or max(row) >= vocab_size:
            span = f"{min(row)}..{max(row)}" if row else "no tokens"
            raise ValueError(
                f"{file}: sequence {number} has token ids {span}; the parent knows 0..{vocab_size - 1}. "
                "Tokenize it with the parent's own tokenizer."
            )
