"""The budget of a streamed pass: its parts, and anonymous memory measured on a model of 1 GB that never exceeds it."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.anonymous_memory import anonymous_bytes, give_freed_memory_back, start_and_peak
from helpers.large_parent import LAYERS, write_parent
from helpers.released_twin import write_released_twin

from lit_puzzle.importance.expert_scores import LeaveOneOut
from lit_puzzle.importance.layer_sums import streamed_sums
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.memory_budget import check_budget, outside_bytes, streaming_need
from lit_puzzle.model.streaming import load_streamed
from lit_puzzle.model.streaming_need import Need
from lit_puzzle.run.footprint import GIB

CPU = torch.device("cpu")


def test_a_budget_decides_between_one_layer_two_layers_and_a_refusal():
    need = Need(process=GIB, outside=0, layer=2 * GIB, converting=GIB // 2, computing=GIB)
    assert need.smallest == 4.5 * GIB and need.ahead == 7 * GIB
    assert not check_budget(4.5, need, Path("parent"))
    assert not check_budget(6.99, need, Path("parent"))
    assert check_budget(7.0, need, Path("parent"))
    with pytest.raises(ValueError, match=r"memory_gib=4\.4 was given; parent needs at least 4\.50 GiB .* layer 2\.00"):
        check_budget(4.4, need, Path("parent"))


def test_the_parts_of_a_checkpoint_by_hand(tmp_path):
    checkpoint = Checkpoint(write_released_twin(tmp_path / "twin"))
    layers = []
    for layer, (experts, _) in enumerate(checkpoint.blocks):
        own = [
            info
            for name, info in checkpoint.tensors.items()
            if name.startswith(f"model.layers.{layer}.") and not name.endswith(("_scales", "k_scale", "v_scale"))
        ]
        codes = sum(2 * 2 * info.num_bytes for info in own if info.dtype == "U8")  # two values of 2 bytes a byte
        layers.append(codes + sum(info.num_bytes for info in own if info.dtype != "U8"))
        assert experts > 0
    need = streaming_need(checkpoint, torch.bfloat16, CPU)
    assert need.layer == max(layers) and need.converting > 0
    assert outside_bytes(checkpoint, torch.bfloat16, CPU, head=True) == 0  # mapped as stored
    sizes = [checkpoint.tensors[name].num_bytes for name in ("model.embed_tokens.weight", "model.norm.weight")]
    assert outside_bytes(checkpoint, torch.float32, CPU, head=False) == 2 * sum(sizes)


@pytest.mark.slow
def test_a_pass_keeps_its_budget(tmp_path):
    """bfloat16 stored, float32 in memory: 8 layers of 100 MB, of which one or two are there at a time."""
    folder = tmp_path / "parent"
    write_parent(folder)
    batches = [{"input_ids": torch.arange(2 * 256).view(2, 256), "attention_mask": torch.ones(2, 256).long()}] * 2
    counted = [batch["attention_mask"].bool() for batch in batches]

    def run(gib: float, name: str) -> None:
        streamed = load_streamed(folder, "float32", gib)
        streamed_sums(streamed, tmp_path / name, batches, counted, LeaveOneOut(), 512)

    smallest = 0.01
    give_freed_memory_back()
    for attempt in range(3):  # the first refusal does not know the batches yet, the second does
        try:
            run(smallest, f"refused{attempt}")
            break
        except ValueError as refused:
            smallest = float(re.findall(r"needs at least (\d+\.\d\d) GiB", str(refused))[0]) + 0.01
    layer = streaming_need(Checkpoint(folder), torch.float32, CPU).layer
    assert layer > 90 * 2**20
    held, before = {}, anonymous_bytes()
    for name, more in (("one", 0.0), ("two", 1.1 * layer / GIB)):
        grown = max(0, anonymous_bytes() - before) / GIB  # a budget is of the whole process, what tests hold included
        gib = smallest + more + grown
        start, largest = start_and_peak(partial(run, gib, name))
        assert largest < gib * GIB, f"{name}: {largest / GIB:.3f} of {gib:.3f} GiB"
        held[name] = largest - start
    assert layer < held["one"] < 3 * layer and layer < held["two"] < LAYERS / 2 * layer
