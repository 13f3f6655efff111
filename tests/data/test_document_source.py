"""Documents of the parent feed a pass directly: which are drawn, what arrives, and documents of another parent."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.anonymous_memory import peak_bytes
from helpers.block_runs import Inputs, make_inputs
from helpers.distillation_runs import random_documents
from lightning import LightningModule, Trainer

from lit_puzzle.data.calibration import CalibrationData, RankBatches
from lit_puzzle.data.document_files import Document, DocumentFolder, write_documents
from lit_puzzle.data.document_source import DocumentSource
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.data.packing_settings import DocumentFilter
from lit_puzzle.data.token_rows import RowBatches, TokenRows, write_token_rows
from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.importance.importance import ExpertImportance
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.model.loading import load_model


@pytest.fixture(scope="module")
def inputs(tiny_config, tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    made = make_inputs(folder, tiny_config)
    documents = [replace(document, effort=EFFORTS[number % 3]) for number, document in enumerate(random_documents(200))]
    write_documents(folder / "mixed", documents, made.parent, shard_documents=64)
    return made._replace(documents=folder / "mixed")


def all_documents(folder: Path) -> list[tuple[list[int], int, str]]:
    """Token ids, prompt tokens and effort of every document, read from the shards one by one."""
    documents, found = DocumentFolder(folder), []
    for number in range(documents.num_shards):
        shard = documents.shard(number)
        for d, effort in enumerate(shard.efforts):
            ids = shard.ids_N[shard.offsets[d] : shard.offsets[d + 1]].tolist()
            mask = shard.mask_N[shard.offsets[d] : shard.offsets[d + 1]].tolist()
            if 1 in mask:
                found.append((ids, mask.index(1), effort))
    return found


def rows_of(source: DocumentSource, parent: Path) -> list[tuple[list[int], int]]:
    return [(ids.tolist(), prompt) for ids, prompt in source.rows(source.open(parent))]


def test_every_document_arrives_once_with_its_prompt(inputs):
    expected = [(ids, prompt) for ids, prompt, _ in all_documents(inputs.documents)]
    assert rows_of(DocumentSource(inputs.documents), inputs.parent) == expected


def test_filter_cut_and_number_of_tokens(inputs):
    efforts = DocumentFilter(efforts=["high"])
    high = [(ids, prompt) for ids, prompt, effort in all_documents(inputs.documents) if effort == "high"]
    assert 0 < len(high) < len(all_documents(inputs.documents))
    assert rows_of(DocumentSource(inputs.documents, efforts), inputs.parent) == high
    drawn = rows_of(DocumentSource(inputs.documents, efforts, tokens=100), inputs.parent)
    total = sum(len(ids) for ids, _ in drawn)
    assert 100 <= total < 100 + max(len(ids) for ids, _ in high) and all(row in high for row in drawn)
    assert drawn == rows_of(DocumentSource(inputs.documents, efforts, tokens=100), inputs.parent)
    assert drawn != rows_of(DocumentSource(inputs.documents, efforts, tokens=100, seed=1), inputs.parent)
    cut = rows_of(DocumentSource(inputs.documents, sequence_tokens=12), inputs.parent)
    assert cut == [(ids[:12], prompt) for ids, prompt, _ in all_documents(inputs.documents) if prompt < 12]


def test_nothing_left_is_one_line(inputs):
    source = DocumentSource(inputs.documents, DocumentFilter(environments=["nothing"]))
    with pytest.raises(ValueError, match="No document is left"):
        rows_of(source, inputs.parent)
    with pytest.raises(ValueError, match="tokens 0, sequence_tokens None were given"):
        DocumentSource(inputs.documents, tokens=0)


class Collect(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    def validation_step(self, batch, batch_idx):
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        self.rows += [ids[mask.bool()].tolist() for ids, mask in pairs]


def trainer_of(folder: Path) -> Trainer:
    folder.mkdir()
    return Trainer(default_root_dir=folder, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                   enable_model_summary=False, enable_checkpointing=False)  # fmt: skip


def test_documents_reach_a_module_and_no_json_lines_are_written(inputs, tmp_path):
    module = Collect()
    data = CalibrationData(inputs.parent, documents=DocumentSource(inputs.documents), batch_size=64, batch_tokens=200)
    trainer_of(tmp_path / "run").validate(module, data, verbose=False)
    assert sorted(module.rows) == sorted(ids for ids, _, _ in all_documents(inputs.documents))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"calibration_tokens"}
    lengths = [[len(row) for row in batch] for batch in data.batches]
    assert max(max(batch) * len(batch) for batch in lengths) <= 200 and max(map(len, lengths)) > 1


def test_importance_of_documents_counts_every_token(inputs, tmp_path):
    data = CalibrationData(inputs.parent, documents=DocumentSource(inputs.documents, tokens=300))
    trainer_of(tmp_path / "run").validate(ExpertImportance(inputs.parent), data, verbose=False)
    assert Importance.load(tmp_path / "run").tokens == TokenRows(tmp_path / "run" / "calibration_tokens").tokens


def test_documents_of_another_parent_are_refused(inputs, tmp_path):
    other = other_parent(inputs, tmp_path)
    with pytest.raises(ValueError, match=r"documents of another parent .* filter.written_by: any"):
        CalibrationData(other, documents=DocumentSource(inputs.documents))
    with pytest.raises(ValueError, match="documents of another parent"):
        PackedDocuments(inputs.documents, other, 64)
    anyone = DocumentFilter(written_by="any")
    CalibrationData(other, documents=DocumentSource(inputs.documents, anyone))
    PackedDocuments(inputs.documents, other, 64, filter=anyone)


def other_parent(inputs: Inputs, folder: Path) -> Path:
    """Another model with the same tokenizer."""
    other = folder / "other_parent"
    shutil.copytree(inputs.parent, other)
    model = load_model(inputs.parent, "bfloat16")
    model.model.norm.weight.data *= 2
    model.save_pretrained(other)
    return other


def test_mapped_rows_are_what_was_written(tmp_path):
    rows = [([5, 6], 1), ([1, 2, 3, 4], 0), ([7, 8], 1)]
    assert write_token_rows(tmp_path / "rows", rows) == 3
    mapped = TokenRows(tmp_path / "rows")
    assert [row.tolist() for row in mapped] == [[1, 2, 3, 4], [5, 6], [7, 8]]  # the longest first, equals in order
    assert mapped.prompt_lengths == [0, 1, 1] and mapped.tokens == 8
    assert (tmp_path / "rows" / "ids.bin").stat().st_size == 4 * 8
    before = mapped.sha256()
    write_token_rows(tmp_path / "rows", [([5, 6], 1), ([1, 2, 3, 4], 0), ([7, 9], 1)])
    assert TokenRows(tmp_path / "rows").sha256() != before


def test_batches_keep_both_limits(tmp_path):
    write_token_rows(tmp_path / "rows", [([1] * length, 0) for length in (9, 4, 4, 3, 2, 2, 1)])
    rows = TokenRows(tmp_path / "rows")
    assert [[len(row) for row in batch] for batch in RowBatches(rows, 3, 8)] == [[9], [4, 4], [3, 2], [2, 1]]
    assert [len(batch) for batch in RowBatches(rows, 3)] == [3, 3, 1]
    assert RowBatches(rows, 3, 8).prompt_lengths() == [[0], [0, 0], [0, 0], [0, 0]]


def test_a_pass_over_mapped_tokens_needs_the_memory_of_a_batch(tmp_path):
    tokens = 4_000_000
    write_token_rows(tmp_path / "rows", ((np.full(1000, 7, np.int32), 0) for _ in range(tokens // 1000)))

    def read() -> None:
        batches = RowBatches(TokenRows(tmp_path / "rows"), 8)
        assert sum(int(batch["scored_mask"].sum()) for batch in RankBatches(batches, 0, 1)) == tokens

    assert peak_bytes(read) < 4 * tokens  # less than what is stored: the batches, not the tokens


def test_damaged_shards_are_named(inputs, tmp_path):
    shutil.copytree(inputs.documents, tmp_path / "documents")
    write_documents(tmp_path / "more", [Document([3, 4, 5], [0, 0, 1], "a", "low")], inputs.parent)
    shutil.copy(tmp_path / "more" / "shard-00000.parquet", tmp_path / "documents" / "shard-00000.parquet")
    with pytest.raises(ValueError, match=r"shard-00000.parquet"):
        rows_of(DocumentSource(tmp_path / "documents"), inputs.parent)
