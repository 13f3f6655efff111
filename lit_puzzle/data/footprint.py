"""How much data a stage runs through, as its recipe says it, and the footprint of `generate`.

    calibration    sequences x tokens: prompts with completions of at most max_new_tokens, the lines of a file, or
                   documents one by one
    documents      tokens of the folder (its record if it is there, else assumed), in sequences of sequence_tokens
    generate       the engine (`lit_puzzle.generation.footprint`) + 80 bytes a token of one shard

Reads `documents.json` and counts the lines of files that are there; writes nothing. Imports no torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_puzzle.generation.footprint import engine_bytes, engine_knobs, engine_name
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Decoding, Device, Footprint, Phase, Work
from lit_puzzle.run.recipe_values import Values

DOCUMENTS_FILE = "documents.json"  # of lit_puzzle.data.document_files
SEQUENCES, SEQUENCE_TOKENS = 12_000, 8192  # of a file that is not there: those of arXiv 2602.11937
BYTES_OF_A_TOKEN = 80  # of a shard in memory: Python integers of ids and masks, and texts
PROMPTS = 100_000  # of a file that is not there


@dataclass(frozen=True)
class Sequences:
    """The batches of a pass over data.

    Attributes:
        count: sequences, over all processes.
        tokens: of each, at most.
        batch_size: sequences of a batch.
        assumed: what was assumed; empty if all was read.
        generating: bytes while the parent generates them on the first process; empty if they are given.
    """

    count: float
    tokens: int
    batch_size: int
    assumed: str
    generating: dict[str, float]

    @property
    def batch_tokens(self) -> float:
        """Tokens of a batch, padding included."""
        return min(self.batch_size, self.count) * self.tokens


def sequences_of(data: Values, device: Device, assumed: Assumed) -> Sequences:
    """Return the batches of a data module of this package.

    Args:
        data: the recipe's `data`, or an object of that form.
        device: that a generating parent runs on.
        assumed: what no recipe says.

    Raises:
        ValueError: a data module of another kind.
    """
    name = str(data.at("class_path")).rpartition(".")[2]
    if name == "PackedDocuments":
        return _documents(data.inside("init_args"), assumed)
    if name == "CalibrationData":
        return _calibration(data.inside("init_args"), device, assumed)
    raise ValueError(f"{data.key('class_path')}: nobody knows what {data.at('class_path')} costs: it is your own.")


def documents_record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder of documents, given as itself or by its run folder; empty if it is not there."""
    found = next(
        (file for file in (folder / DOCUMENTS_FILE, folder / "documents" / DOCUMENTS_FILE) if file.is_file()), None
    )
    return {} if found is None else dict(json.loads(found.read_text()))


def _documents(data: Values, assumed: Assumed) -> Sequences:
    folder, tokens = data.path("documents"), data.whole("sequence_tokens", least=1)
    record = documents_record(folder)
    note = "" if record else f"{folder} is not there: {assumed.documents:.0e} tokens are assumed"
    total = float(record.get("tokens", assumed.documents))
    return Sequences(max(total / tokens, 1), tokens, data.whole("batch_size", least=1), note, {})


def _one_by_one(data: Values, assumed: Assumed) -> Sequences:
    """Return the batches of documents that are a sequence each, as many in a batch as `batch_tokens` has room for."""
    folder, source = data.path("documents.folder"), data.inside("documents")
    record = documents_record(folder)
    longest = max((row["longest"] for row in record["shards"]), default=1) if record else SEQUENCE_TOKENS
    tokens = min(longest, int(source.get("sequence_tokens") or longest))
    total = min(float(source.get("tokens") or math.inf), float(record.get("tokens", assumed.documents)))
    room = max(int(data.get("batch_tokens") or tokens * data.whole("batch_size", least=1)) // tokens, 1)
    note = "" if record else f"{folder} is not there: documents of {SEQUENCE_TOKENS:,} tokens are assumed"
    return Sequences(max(total / tokens, 1), tokens, min(data.whole("batch_size", least=1), room), note, {})


def _calibration(data: Values, device: Device, assumed: Assumed) -> Sequences:
    prompts, batch_size = data.get("prompts"), data.whole("batch_size", least=1)
    if data.get("documents") is not None:
        return _one_by_one(data, assumed)
    if prompts is None or data.get("sequences") is not None:
        file = Path(str(data.get("sequences")))
        note = f"{file} is not there: {SEQUENCES:,} sequences of {SEQUENCE_TOKENS:,} tokens are assumed"
        if file.is_file():
            lines = file.read_text().splitlines()
            longest = max((_tokens(line) for line in lines), default=1)
            return Sequences(len(lines), longest, batch_size, f"texts of {file}: 4 characters a token", {})
        return Sequences(SEQUENCES, SEQUENCE_TOKENS, batch_size, note, {})
    new = data.whole("sampling.max_new_tokens")
    size = model_size(planned_config(data.path("parent")).config)
    count = int(data.get("prompts.num_prompts") or PROMPTS)
    held = engine_bytes(size, data.inside("engine"), device, assumed.prompt_tokens, new, count)
    return Sequences(
        count, assumed.prompt_tokens + new, batch_size, f"prompts of {assumed.prompt_tokens:,} tokens", held
    )


def _tokens(line: str) -> int:
    row = json.loads(line)
    return len(row["input_ids"]) if "input_ids" in row else len(row.get("text", "")) // 4


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `generate`."""
    planned = planned_config(values.path("parent"))
    size, engine, new = model_size(planned.config), values.inside("engine"), values.whole("sampling.max_new_tokens")
    count = values.get("prompts.num_prompts")
    note = "" if count else f"{PROMPTS:,} prompts are assumed"
    tokens, shard = assumed.prompt_tokens + new, values.whole("shard_size", least=1)
    name, ranks = engine_name(engine, device), int(engine.get("tensor_parallel", 1))
    work = Work(
        "completions",
        planned.config,
        float(count or PROMPTS),
        assumed.prompt_tokens,
        dtype=str(engine.at("dtype")),
        decoding=Decoding(new, engine.whole("batch_size", least=1), name, ranks),
    )
    texts = {"documents of one shard": float(BYTES_OF_A_TOKEN * min(shard, count or PROMPTS) * tokens)}
    held = engine_bytes(size, engine, device, assumed.prompt_tokens, new, work.sequences)
    return Footprint(
        "generate",
        (Phase("completions", held | (texts if device.kind == "cpu" else {})),),
        host=texts,
        disk={"documents": 5.0 * work.sequences * tokens},
        works=(work,),
        knobs=engine_knobs(engine, device),
        notes=(planned.assumed, note, f"prompts of {assumed.prompt_tokens:,} tokens", "completions as long as allowed"),
    )
