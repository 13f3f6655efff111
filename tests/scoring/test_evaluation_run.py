"""Evaluations by an engine that reads folders: the scores of the swapped model, one folder at a time, resumable."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.vllm_environment import ROOT, needs_vllm, output_of, start_in_vllm
from safetensors.torch import save_file

from lit_puzzle.distill.settings import DistillationEvaluation
from lit_puzzle.evaluate.before_after import EvaluationSettings
from lit_puzzle.evaluate.long_context import LongContextAccuracy
from lit_puzzle.evaluate.long_context_settings import Grading, LongContextProblems
from lit_puzzle.generation.sampling import EngineSettings, Sampling, ServerSettings
from lit_puzzle.library.library import parent_blocks
from lit_puzzle.library.swap import swapped
from lit_puzzle.model.blocks import with_own_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.loading import load_model
from lit_puzzle.scoring.evaluation_run import FOLDER, candidate_folder, engine_of
from lit_puzzle.scoring.score_files import Entry
from lit_puzzle.spec import BlockSpec
from lit_puzzle.tiny.world import Chains, Counting

PARENT = ROOT / "lit_puzzle" / "assets" / "tiny_parent"


def evaluation(**settings: Any) -> LongContextAccuracy:
    problems = LongContextProblems(environments=[Chains(), Counting()], efforts=["low", "high"], problems_per_effort=6)
    return LongContextAccuracy(problems, sampling=Sampling(64, temperature=0.0), name="far", **settings)


def changed_entry() -> Entry:
    experts, window = parent_blocks(Checkpoint(PARENT).config)[1].experts, 24
    return Entry(1, f"experts=12,window={window}", "pair", BlockSpec(experts[2:14], window), None)


def test_the_folder_of_a_candidate_is_the_swapped_parent(tmp_path: Path) -> None:
    entry, ids = changed_entry(), torch.arange(90)[None] + 3
    model = load_model(PARENT, "float32")
    parent = with_own_blocks(model)
    trained = {"mlp.router.bias": torch.arange(12.0) / 8 - 0.75}
    with torch.no_grad(), swapped(parent, entry.layer, entry.block, trained):
        expected = parent(input_ids=ids).logits
    with candidate_folder(PARENT, tmp_path / FOLDER, entry, lambda _: trained) as folder, torch.no_grad():
        found = load_model(folder, "float32")(input_ids=ids).logits
        untouched = load_model(PARENT, "float32")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert (untouched - expected).abs().max() > 0.1 and not list(tmp_path.iterdir())
    with candidate_folder(PARENT, tmp_path / FOLDER, None, lambda _: {}) as folder:
        assert folder == PARENT and not list(tmp_path.iterdir())


def test_a_tensor_that_the_parent_has_not_is_refused(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / FOLDER / "model.safetensors")  # of a run that was killed
    with (
        pytest.raises(ValueError, match=r"has a trained mlp\.gate, which .* holds in another form"),
        candidate_folder(PARENT, tmp_path / FOLDER, changed_entry(), lambda _: {"mlp.gate": torch.zeros(1)}),
    ):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_teacher_forcing_needs_the_model_in_memory() -> None:
    assert engine_of(evaluation()) is None and engine_of(evaluation(engine=EngineSettings())) == EngineSettings()
    with pytest.raises(ValueError, match=r"far: engine vllm was given with grading\.mode teacher_forced"):
        evaluation(engine=EngineSettings("vllm"), grading=Grading("teacher_forced"))


@pytest.mark.parametrize(
    "make",
    [
        lambda engine: evaluation(engine=engine),
        lambda engine: EvaluationSettings(engine=engine),
        lambda engine: DistillationEvaluation([Chains()], engine=engine),
    ],
)
def test_a_running_server_measures_no_folders(make: Callable[[EngineSettings], object]) -> None:
    server = EngineSettings("server", server=ServerSettings("http://localhost:8000/v1"))
    with pytest.raises(ValueError, match=r"engine\.name: server was given; a running server has one model"):
        make(server)


@needs_vllm
def test_vllm_measures_as_transformers_does(tmp_path: Path) -> None:
    """Scores of a candidate's folder, and the episodes of a folder before and after training."""
    output_of(start_in_vllm(ROOT / "tests" / "helpers" / "vllm_measurements.py", tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("scores", "episodes"):
        assert found["vllm"][name] == found["transformers"][name]
    measured = found["vllm"]["scores"]
    assert len(found["vllm"]["episodes"]) == len(measured["score"]) == 24 and 0 < sum(measured["score"]) < 24
    assert len(measured["tokens/low"]) == 12 and min(measured["tokens/low"]) > 0
