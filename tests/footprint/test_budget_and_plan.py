"""The plan of a parent that is read layer by layer holds the bytes that its budget is checked against in a run."""

import json
from pathlib import Path

import pytest
import torch

from lit_puzzle.footprint.fit import advice, fits
from lit_puzzle.footprint.plan import Plan, make_plan
from lit_puzzle.importance.expert_scores import LeaveOneOut
from lit_puzzle.importance.footprint import most_chunk_bytes
from lit_puzzle.importance.layer_sums import streamed_sums
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.memory_budget import outside_bytes, streaming_need
from lit_puzzle.model.streaming import StreamedModel, load_streamed
from lit_puzzle.model.streaming_need import IMPORTED
from lit_puzzle.run.footprint import GIB, Device
from lit_puzzle.run.recipe import load_recipe

PARENT, CPU = Path("lit_puzzle/assets/tiny_parent"), torch.device("cpu")
ROWS, TOKENS, CHUNK = 2, 48, 64


def planned(folder: Path, gib: float) -> Plan:
    file = folder / "sequences.jsonl"
    file.write_text("".join(json.dumps({"input_ids": [9] * TOKENS}) + "\n" for _ in range(4)))
    words = [
        f"--data.init_args.sequences={file}",
        "--data.init_args.prompts=null",
        f"--data.init_args.batch_size={ROWS}",
        f"--model.init_args.chunk_tokens={CHUNK}",
        f"--model.init_args.memory_gib={gib}",
    ]
    plan = make_plan(load_recipe("recipes/importance.yaml"), "validate", None, [*words, "--gpu=cpu", "--gpus=1"])
    assert plan is not None
    return plan


@pytest.fixture(scope="module")
def parent() -> StreamedModel:
    return load_streamed(PARENT, "float32", 4.0)


def test_the_parts_are_those_of_the_budget(parent: StreamedModel, tmp_path: Path) -> None:
    chunk = most_chunk_bytes(model_size(parent.checkpoint.config), CHUNK, 4)
    computing = parent.forward_bytes(ROWS * TOKENS, TOKENS) + chunk
    need = streaming_need(parent.checkpoint, torch.float32, CPU, computing=computing)
    parts = planned(tmp_path, 4.0).footprint.fullest.parts
    assert parts["one layer from disk, and the next"] == 2 * need.layer
    assert parts["an expert while it is converted"] == 2 * need.converting
    assert parts["activations of one layer"] == need.computing
    outside = outside_bytes(parent.checkpoint, torch.float32, CPU, head=False)
    assert parts["embedding, last norm and head"] == outside > 0


def test_a_budget_that_a_run_refuses_is_refused_by_the_plan_in_the_same_words(
    parent: StreamedModel, tmp_path: Path
) -> None:
    gib = IMPORTED / GIB + 1e-4
    plan = planned(tmp_path, gib)
    assert plan.to_json()["fits"] is False and not fits(plan.footprint, plan.device)
    said = plan.footprint.refusals[0]
    small = StreamedModel(parent.model, parent.checkpoint, CPU, 1e-4)
    batch = {"input_ids": torch.full((ROWS, TOKENS), 9), "attention_mask": torch.ones(ROWS, TOKENS).long()}
    with pytest.raises(ValueError, match=r"memory_gib=0\.0001 was given") as refused:
        streamed_sums(small, tmp_path / "pass", [batch], [batch["attention_mask"].bool()], LeaveOneOut(), CHUNK)
    for words in ("needs at least", "GiB with one layer in memory", "Raise memory_gib, or make batches smaller."):
        assert words in said and words in str(refused.value)
    device = Device("cpu", "cpu", 1, 64 * GIB)
    assert advice(plan.footprint, None, device, None) == [said]  # type: ignore[arg-type]  # nothing is computed again
    assert fits(planned(tmp_path, 4.0).footprint, device)
