"""Blocks of a parent that is read one layer at a time keep the budget of memory, and too small a one is refused."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.anonymous_memory import give_freed_memory_back, start_and_peak
from helpers.block_runs import Inputs, fit_streamed
from helpers.distillation_runs import random_documents
from helpers.large_parent import write_parent

from lit_puzzle.data.document_files import write_documents
from lit_puzzle.distill.settings import BlockTrainingSettings
from lit_puzzle.library.library import Candidate, Library, candidate_name, parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.memory_budget import GIB, streaming_need
from lit_puzzle.spec import BlockSpec
from lit_puzzle.tiny.tokenizer import build_tokenizer

STEPS = 2
NOISE = 16 * 2**20  # of the interpreter and its allocator, a sixth of a layer
DATA = {"sequence_tokens": 1024, "batch_size": 2, "validation_one_in": 6}
TRAINED = BlockTrainingSettings(layers=[0, 1, 2])


def make_library(folder: Path, parent: Path) -> None:
    """Half of the experts; where attention is full, a window too, whose attention trains."""
    checkpoint, layers = Checkpoint(parent), []
    for own in parent_blocks(checkpoint.config):
        windows = [own.window_tokens] if own.window_tokens else [None, 32]
        blocks = [BlockSpec(kept, window) for window in windows for kept in (own.experts, own.experts[::2])]
        layers.append(tuple(Candidate(candidate_name(own, block), block) for block in blocks))
    folder.mkdir()
    Library(checkpoint.fingerprint(), 32, checkpoint.config, tuple(layers)).save(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("large")
    write_parent(folder / "parent")
    build_tokenizer().save_pretrained(folder / "parent")
    make_library(folder / "library", folder / "parent")
    write_documents(folder / "documents", random_documents(1500), folder / "parent")
    return Inputs(folder / "parent", folder / "library", folder / "documents")


@pytest.mark.slow
def test_blocks_keep_their_budget(inputs: Inputs, tmp_path: Path) -> None:
    """bfloat16 stored, float32 in memory: one or two layers of 100 MB at a time, beside the graph of a block."""

    refusal = tmp_path / "refusal.txt"

    def run(gib: float, name: str) -> None:
        try:
            fit_streamed(tmp_path / name, inputs, STEPS, gib, data=DATA, training=TRAINED)
        except ValueError as refused:
            refusal.write_text(str(refused))

    def start_and_peak_of(gib: float, name: str) -> tuple[int, int]:
        refusal.unlink(missing_ok=True)
        return start_and_peak(partial(run, gib, name))

    smallest, refusals = 0.01, 0
    give_freed_memory_back()
    while True:  # the first refusal does not know the batches yet, the second does
        start, largest = start_and_peak_of(smallest, f"one{refusals}")
        if not refusal.is_file():
            break
        assert not (tmp_path / f"one{refusals}" / "layers.0").exists()
        (needed,) = re.findall(r"needs at least (\d+\.\d\d) GiB", refusal.read_text())
        smallest, refusals = float(needed) + 0.01, refusals + 1
    assert 2 <= refusals <= 3 and largest < smallest * GIB + NOISE, f"{largest / GIB:.3f} of {smallest:.3f} GiB"
    layer = streaming_need(Checkpoint(inputs.parent), torch.float32, torch.device("cpu")).layer
    two = smallest + 1.1 * layer / GIB
    start_of_two, largest_of_two = start_and_peak_of(two, "two")
    assert largest_of_two < two * GIB + NOISE, f"{largest_of_two / GIB:.3f} of {two:.3f} GiB"
    assert layer < largest - start < largest_of_two - start_of_two
