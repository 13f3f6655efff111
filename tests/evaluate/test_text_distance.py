"""text_distance.py: numbers by transformers' logits in float64, errors over documents, the documents of validation."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_puzzle.data.document_files import Document, DocumentFolder, write_documents
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.data.held_out_documents import held_out_documents
from lit_puzzle.evaluate.position_loss import mean_over_documents
from lit_puzzle.evaluate.text_distance import summarize, text_distance

ONE_IN = 4


@pytest.fixture(scope="module")
def inputs(two_models: Path) -> Path:
    """A folder with a parent, a child with other weights, and documents of 4 to 20 tokens."""
    root = two_models
    rng, documents = random.Random(0), []
    for _ in range(40):
        prompt, answer = (rng.choices(range(3, 128), k=rng.randrange(2, 11)) for _ in range(2))
        documents.append(Document(prompt + answer, [0] * len(prompt) + [1] * len(answer), "a", "none"))
    write_documents(root / "documents", documents, root / "parent", shard_documents=15)
    return root


@torch.no_grad()
def by_hand(inputs: Path) -> list[dict[str, float]]:
    """Sums of each held-out document, one at a time, in float64."""
    models = [
        AutoModelForCausalLM.from_pretrained(inputs / name, experts_implementation="eager").double().eval()
        for name in ("child", "parent")
    ]
    rows = []
    for ids, mask in held_out_documents(DocumentFolder(inputs / "documents"), ONE_IN):
        q, p = (model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for model in models)
        row = dict.fromkeys(("targets", "kl", "log_loss", "parent_log_loss", "same_token"), 0.0)
        for place in (place for place, target in enumerate(mask) if target):
            before = place - 1
            row["targets"] += 1
            row["kl"] += float((p[before].exp() * (p[before] - q[before])).sum())
            row["log_loss"] -= float(q[before, ids[place]])
            row["parent_log_loss"] -= float(p[before, ids[place]])
            row["same_token"] += float(q[before].argmax() == p[before].argmax())
        rows.append(row)
    return rows


@pytest.mark.parametrize(("batch_size", "chunk_tokens"), [(1, 512), (8, 7)])
def test_sums_are_those_of_transformers(
    inputs: Path, tmp_path: Path, batch_size: int, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_puzzle.evaluate.text_distance.CHUNK_TOKENS", chunk_tokens)
    folders = inputs / "child", inputs / "parent", inputs / "documents"
    results = text_distance(tmp_path, *folders, ONE_IN, batch_size)
    found = [json.loads(line) for line in (tmp_path / "text_distance.jsonl").read_text().splitlines()]
    expected = by_hand(inputs)
    assert 4 < len(found) == len(expected) < 20
    for row, right in zip(found, expected, strict=True):
        assert row == pytest.approx(right, rel=1e-4)
    assert results == pytest.approx(summarize(expected), rel=1e-4)
    assert results["kl"] > 0.01 and results["perplexity/ratio"] == pytest.approx(
        results["perplexity"] / results["perplexity/parent"]
    )


def test_a_model_is_at_no_distance_from_itself(inputs: Path, tmp_path: Path) -> None:
    results = text_distance(tmp_path, inputs / "parent", inputs / "parent", inputs / "documents", 1)
    assert results["documents"] == 40 and results["same_token"] == 1.0
    assert results["kl"] == pytest.approx(0, abs=1e-7) and results["perplexity/ratio"] == pytest.approx(1)


def test_the_documents_are_those_of_validation(inputs: Path, tmp_path: Path) -> None:
    class Process:
        default_root_dir, global_rank, world_size = tmp_path, 0, 1

    data = PackedDocuments(inputs / "documents", inputs / "parent", 64, validation_one_in=ONE_IN)
    data.trainer = Process()  # type: ignore[assignment]
    data.prepare_data()
    data.setup("fit")
    held_out = held_out_documents(DocumentFolder(inputs / "documents"), ONE_IN)
    assert data.statistics["validation/documents"] == len(held_out)
    assert data.statistics["validation/targets"] == sum(sum(mask) for _, mask in held_out)
    with pytest.raises(ValueError, match="none of 40 documents is held out by validation_one_in 99991"):
        held_out_documents(DocumentFolder(inputs / "documents"), 99_991)


def test_errors_count_documents() -> None:
    """Twice the same tokens in the same documents leave the error as it was; twice the documents shrink it."""
    sums, targets = [1.0, 4.0, 3.0, 8.0], [2.0, 4.0, 6.0, 8.0]
    mean, error = mean_over_documents(sums, targets)
    assert mean == 16 / 20
    assert error == pytest.approx(math.sqrt(4 / 3 * sum((x - 0.8 * n) ** 2 for x, n in zip(sums, targets))) / 20)
    assert mean_over_documents([2 * x for x in sums], [2 * n for n in targets]) == pytest.approx((mean, error))
    assert mean_over_documents(sums * 4, targets * 4)[1] == pytest.approx(error * math.sqrt(3 / 15), rel=1e-9)
    with pytest.raises(ValueError, match="a standard error needs two"):
        summarize([{"targets": 1.0, "kl": 0.0, "log_loss": 0.0, "parent_log_loss": 0.0, "same_token": 0.0}])


def test_wrong_numbers_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validation_one_in 0, batch_size 8"):
        text_distance(tmp_path, tmp_path, tmp_path, tmp_path, validation_one_in=0)
