"""Folders of documents: what is written is read back, by others too, and what a model could not read is refused."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from pyarrow import Table, parquet
from transformers import GptOssForCausalLM

from lit_puzzle.data.document_files import (
    Document,
    DocumentFolder,
    close_folder,
    shard_name,
    write_documents,
    write_shard,
)
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.tiny.tokenizer import build_tokenizer

DOCUMENTS = [
    Document([5, 6, 7], [0, 1, 1], "chains", "low", 1.0),
    Document([8, 9], [0, 1], "prompts", "high"),
    Document([10, 11, 12, 13], [1, 0, 0, 1], "chains", "high", 0.0),
]


@pytest.fixture(scope="module")
def parent(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    GptOssForCausalLM(tiny_config(vocab_size=128, max_position_embeddings=64)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def written(parent, tmp_path) -> Path:
    write_documents(tmp_path / "d", DOCUMENTS, parent, shard_documents=2, source="made up")
    return tmp_path / "d"


def test_documents_come_back(written, parent):
    folder = DocumentFolder(written)
    assert (len(folder), folder.num_shards, folder.first) == (3, 2, [0, 2, 3])
    found = []
    for number in range(2):
        shard = folder.shard(number)
        for d in range(len(shard)):
            span = slice(shard.offsets[d], shard.offsets[d + 1])
            tokens = shard.ids_N[span].tolist(), shard.mask_N[span].tolist()
            found.append(Document(*tokens, shard.environments[d], shard.efforts[d], shard.correct[d]))
    expected = [*DOCUMENTS[:2], Document([10, 11, 12, 13], [0, 0, 0, 1], "chains", "high", 0.0)]  # no target first
    assert found == expected
    record = json.loads((written / "documents.json").read_text())
    assert record["fingerprint"] == fingerprint(parent) and record["vocab_size"] == 128
    assert (record["documents"], record["tokens"], record["targets"]) == (3, 9, 4)
    assert record["efforts"] == {"high": 2, "low": 1} and record["settings"] == {"source": "made up"}


def test_the_datasets_library_reads_the_shards(written, tmp_path):
    from datasets import load_dataset

    found = load_dataset(
        "parquet", data_files=str(written / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(found) == [asdict(document) for document in DOCUMENTS]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document([5, 128], [0, 1], "a", "low"), r"shard-00000.*document 1 holds 128; allowed are token ids 0\.\.127"),
        (Document([5, -1], [0, 1], "a", "low"), "holds -1"),
        (Document([5, 6], [0, 2], "a", "low"), "holds 2; allowed are loss_mask values 0 and 1"),
        (Document([5, 6], [1], "a", "low"), "document 1 has a loss_mask of another length"),
        (Document([5] * 65, [1] * 65, "a", "low"), "document 1 has 65 tokens; .* holds 64"),
    ],
)
def test_what_a_model_cannot_read_is_refused(document, message, parent, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_documents(tmp_path / "d", [DOCUMENTS[0], document], parent)
    assert not (tmp_path / "d" / "documents.json").exists()


def test_empty_shards_count(parent, written):
    write_shard(written, 2, [])
    close_folder(written, DocumentFolder(written).writer, 3, {})
    assert DocumentFolder(written).first == [0, 2, 3, 3] and len(DocumentFolder(written).shard(2)) == 0


def test_incomplete_or_damaged_folders_are_refused(written, parent, tmp_path):
    with pytest.raises(ValueError, match=r"missing' does not exist"):
        DocumentFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"holds no documents\.json"):
        DocumentFolder(parent)
    (written / shard_name(1)).write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is no Parquet file"):
        DocumentFolder(written).shard(1)
    parquet.write_table(Table.from_pylist([{"text": "a"}]), written / shard_name(1))
    with pytest.raises(ValueError, match=r"has the columns \['text'\]"):
        DocumentFolder(written).shard(1)
    write_shard(written, 1, DOCUMENTS)
    with pytest.raises(ValueError, match=r"has 3 documents, documents\.json says 1"):
        DocumentFolder(written).shard(1)
    (written / shard_name(1)).unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is missing"):
        DocumentFolder(written)


def test_a_shard_that_was_exchanged_is_refused(written):
    write_shard(written, 0, [DOCUMENTS[0], Document([8, 10], [0, 1], "prompts", "high")])
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is not the shard of documents\.json: the SHA-256"):
        DocumentFolder(written).shard(0)
    with pytest.raises(ValueError, match="SHA-256 of its tokens"):
        DocumentFolder(written).check_shards([1, 0])
    record = json.loads((written / "documents.json").read_text())
    del record["shards"][0]["sha256"]  # as older records
    (written / "documents.json").write_text(json.dumps(record))
    assert len(DocumentFolder(written).shard(0)) == 2
    write_shard(written, 0, [DOCUMENTS[0], Document([8, 10], [0, 1], "prompts", "low")])
    with pytest.raises(ValueError, match="SHA-256 of its labels"):
        DocumentFolder(written).shard(0)
    del record["shards"][0]["labels_sha256"]
    (written / "documents.json").write_text(json.dumps(record))
    assert len(DocumentFolder(written).shard(0)) == 2


def test_readers_must_understand_the_ids(written, parent, tiny_config, tmp_path):
    folder = DocumentFolder(written)
    folder.check_reader(parent, 64)
    with pytest.raises(ValueError, match=r"65 tokens were asked for; the context of .* holds 64"):
        folder.check_reader(parent, 65)
    tokenizer = build_tokenizer()
    GptOssForCausalLM(tiny_config(vocab_size=136)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"with vocabulary of 128, .* has 136"):
        folder.check_reader(tmp_path / "other", 8)
    GptOssForCausalLM(tiny_config(vocab_size=128)).save_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was written with tokenizer"):
        folder.check_reader(tmp_path / "other", 8)
