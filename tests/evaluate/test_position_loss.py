"""position_loss.py: sums by hand from transformers' logits in float64, errors over documents, bins without entry."""

import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_puzzle.data.document_files import Document, DocumentFolder, write_documents
from lit_puzzle.data.held_out_documents import held_out_documents
from lit_puzzle.evaluate.position_loss import bin_names, binned_sums, summarize_bins
from lit_puzzle.evaluate.text_distance import text_distance

EDGES = [1, 4, 16, 40, 60]


@pytest.fixture(scope="module")
def inputs(two_models: Path) -> Path:
    """A parent, a child with a window, and documents of 12 to 44 tokens whose targets lie anywhere."""
    root = two_models
    rng = random.Random(0)
    ids = [rng.choices(range(3, 128), k=length) for length in (12, 20, 30, 39, 44)]
    masks = [[0, *rng.choices((0, 1), k=len(row) - 2), 1] for row in ids]
    documents = [Document(row, mask, "a", "none") for row, mask in zip(ids, masks, strict=True)]
    write_documents(root / "documents", documents, root / "parent")
    return root


@torch.no_grad()
def test_results_are_those_of_a_reference_in_float64(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_puzzle.evaluate.text_distance.CHUNK_TOKENS", 7)
    results = text_distance(
        tmp_path, inputs / "child", inputs / "parent", inputs / "documents", 1, 2, position_bins=EDGES
    )
    child, parent = (
        AutoModelForCausalLM.from_pretrained(inputs / name, experts_implementation="eager").double().eval()
        for name in ("child", "parent")
    )
    losses: dict[str, list[tuple[int, float, float]]] = {}  # bin -> (document, child's loss, parent's) of each target
    for number, (ids, mask) in enumerate(held_out_documents(DocumentFolder(inputs / "documents"), 1)):
        q, p = (model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for model in (child, parent))
        for place in (place for place, target in enumerate(mask) if target):
            name = "1-3" if place < 4 else "4-15" if place < 16 else "16-39" if place < 40 else "40-59"
            pair = -float(q[place - 1, ids[place]]), -float(p[place - 1, ids[place]])
            losses.setdefault(name, []).append((number, *pair))
    for name in ("1-3", "4-15", "16-39"):
        rows = losses[name]
        documents = {number for number, _, _ in rows}
        columns = [q for _, q, _ in rows], [p for _, _, p in rows], [q - p for _, q, p in rows]
        for key, values in zip(("", "/parent", "/difference"), columns, strict=True):
            mean = sum(values) / len(values)
            sums = {
                number: sum(v - mean for row, v in zip(rows, values, strict=True) if row[0] == number)
                for number in documents
            }
            variance = len(sums) / (len(sums) - 1) * sum(part**2 for part in sums.values())
            assert results[f"loss/{name}{key}"] == pytest.approx(mean, rel=1e-4, abs=1e-5)
            assert results[f"loss/{name}{key}_se"] == pytest.approx(math.sqrt(variance) / len(values), rel=1e-3)
    # one document alone is that long: no entry, and the table says so
    assert len({number for number, _, _ in losses["40-59"]}) == 1
    assert not any(key.startswith("loss/40-59") for key in results)
    assert "no entry" in capsys.readouterr().out
    plain = text_distance(tmp_path / "plain", inputs / "child", inputs / "parent", inputs / "documents", 1)
    assert plain == pytest.approx({key: value for key, value in results.items() if not key.startswith("loss/")})


def test_every_target_is_in_one_bin_or_outside_of_all() -> None:
    places = torch.tensor([0, 1, 3, 4, 59, 60, 99])
    losses = {name: torch.arange(7.0) for name in ("log_loss", "parent_log_loss")}
    found = binned_sums(losses, places, EDGES)
    assert [found[f"targets/{name}"] for name in bin_names(EDGES)] == [2, 1, 0, 1]
    assert [found[f"log_loss/{name}"] for name in bin_names(EDGES)] == [1 + 2, 3, 0, 4]
    assert summarize_bins([found], EDGES) == {}
    twice = summarize_bins([found, found], EDGES)
    assert twice["loss/1-3"] == 1.5 and twice["loss/1-3_se"] == 0 and "loss/16-39" not in twice


@pytest.mark.parametrize("edges", [[], [5], [4, 4], [9, 3], [-1, 3]])
def test_wrong_bins_are_refused_before_anything_is_read(edges: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"position_bins is .* growing numbers"):
        text_distance(tmp_path, tmp_path, tmp_path, tmp_path, position_bins=edges)
