"""Scores of a parent that is read layer by layer: the bits of the resident ones, in several passes, after a kill."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.streamed_runs import ENOUGH_GIB, Killed
from transformers import GptOssForCausalLM

from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.library.candidates import library
from lit_puzzle.model import layer_pass
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.scoring.block_quality import METRICS
from lit_puzzle.scoring.scores import Scores
from lit_puzzle.scoring.scoring import score
from lit_puzzle.scoring.settings import Memory, ScoringSettings
from lit_puzzle.scoring.streamed_scores import OF_THE_PARENT
from lit_puzzle.training.fabric import FabricSettings

LAYERS, EXPERTS = 4, 8
DEPTHS = {depth: ScoringSettings(rank_samples=4, depth=depth) for depth in ("end", "layer")}


@pytest.fixture(scope="module")
def inputs(tiny_config, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = GptOssForCausalLM(tiny_config(num_hidden_layers=LAYERS))
    return write_inputs(tmp_path_factory.mktemp("inputs"), model, [4, 1], [4])


def write_inputs(folder: Path, model: GptOssForCausalLM, experts: list[int], windows: list[int]) -> Path:
    """A folder with `parent`, `library` and `sequences.jsonl`."""
    model.save_pretrained(folder / "parent")
    rows = tuple(torch.rand(EXPERTS, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYERS))
    for name in ("importance", "library"):
        (folder / name).mkdir()
    Importance(fingerprint(folder / "parent"), "hand", 1, rows).save(folder / "importance")
    library(folder / "library", folder / "parent", folder / "importance", experts=experts, windows=windows)
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(3, 128, (30 - 4 * i,), generator=generator).tolist() for i in range(5)]
    lines = [json.dumps({"input_ids": row, "prompt_tokens": i % 3}) + "\n" for i, row in enumerate(ids)]
    (folder / "sequences.jsonl").write_text("".join(lines))
    return folder


def run(folder: Path, inputs: Path, scoring: ScoringSettings, gib: float | None, precision="32-true") -> Scores:
    folder.mkdir(exist_ok=True)
    data = CalibrationData(inputs / "parent", sequences=inputs / "sequences.jsonl", batch_size=2)
    fabric = FabricSettings(accelerator="cpu", precision=precision, memory_gib=gib)
    score(folder, inputs / "parent", inputs / "library", data, fabric, scoring)
    assert not list(folder.glob("hidden_states*"))
    return Scores.load(folder)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_streamed_scores_are_the_resident_ones_bit_for_bit(inputs, tmp_path, depth, precision):
    resident = run(tmp_path / "resident", inputs, DEPTHS[depth], None, precision)
    streamed = run(tmp_path / "streamed", inputs, DEPTHS[depth], ENOUGH_GIB, precision)
    assert streamed == resident
    names = {*METRICS, "mean_rank"} if depth == "end" else {"layer_error", "mean_rank"}
    assert all(set(metrics) == names for metrics in streamed.entries.values())
    assert all(next(iter(metrics.values())).mean > 0 for metrics in streamed.entries.values())


@pytest.fixture(scope="module")
def unjudged(tiny_config, tmp_path_factory) -> Path:
    """Inputs whose layer 1 routes no token to its least important expert, and windows longer than every sequence."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(tiny_config(num_hidden_layers=LAYERS))
    least = int(torch.rand(EXPERTS, generator=torch.Generator().manual_seed(1)).argmin())
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[least] = -1e4
    return write_inputs(tmp_path_factory.mktemp("unjudged"), model, [7, 4], [40, 4])


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_candidate_that_the_data_cannot_judge_gets_no_score(unjudged, tmp_path, depth, monkeypatch, capsys):
    """An expert that no token needs and a window that no sequence fills: no score, which is not a score of 0."""
    resident = run(tmp_path / "resident", unjudged, DEPTHS[depth], None)
    capsys.readouterr()
    streamed = run(tmp_path / "streamed", unjudged, DEPTHS[depth], ENOUGH_GIB)
    assert streamed == resident
    silent = {key for key, metrics in streamed.entries.items() if not metrics}
    assert silent == {(1, "experts=7"), (1, "window=40"), (3, "window=40")}
    assert all((streamed.could_tell[key] == {"tokens": 0.0}) == (key in silent) for key in streamed.entries)
    said = " ".join(capsys.readouterr().out.split())
    assert "none of the scored tokens can tell: window=40 in layers 1, 3" in said
    assert "none of the tokens can tell: experts=7 in layers 1" in said
    stop_after(monkeypatch, 12, lambda: run(tmp_path / "killed", unjudged, DEPTHS[depth], ENOUGH_GIB))
    assert run(tmp_path / "killed", unjudged, DEPTHS[depth], ENOUGH_GIB) == resident


def test_a_local_error_is_that_of_the_layers_output(inputs, tmp_path):
    """Against a forward pass of the stock model with all other experts masked, one sequence at a time."""
    found = run(tmp_path / "run", inputs, DEPTHS["layer"], ENOUGH_GIB).entries[2, "experts=4"]["layer_error"].mean
    kept = Importance.load(inputs / "importance").keep([8, 8, 4, 8])[2]
    model = GptOssForCausalLM.from_pretrained(inputs / "parent", attn_implementation="eager").eval()
    errors = []
    for line in (inputs / "sequences.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, prompt = torch.tensor([row["input_ids"]]), row["prompt_tokens"]
        scored = slice(prompt - 1, -1) if prompt else slice(None)
        outputs = []
        bias = model.model.layers[2].mlp.router.bias
        before = bias.detach().clone()
        for masked in (False, True):
            with torch.no_grad():
                bias[[i for i in range(EXPERTS) if masked and i not in kept]] = float("-inf")
                outputs.append(model(ids, output_hidden_states=True).hidden_states[3][0, scored].double())
                bias.copy_(before)
        errors.append(float((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()))
    assert found == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_a_small_disk_takes_several_passes_to_the_same_scores(inputs, tmp_path, at_once, monkeypatch):
    resident = run(tmp_path / "resident", inputs, DEPTHS["end"], None)
    tokens, entries = padded_tokens(inputs, tmp_path / "resident"), len(resident.entries)
    gib = (at_once + OF_THE_PARENT) * tokens * 32 * 4 / 2**30
    passes = count_passes(monkeypatch)
    scoring = ScoringSettings(rank_samples=4, memory=Memory(disk_gib=gib * 1.0001))
    assert run(tmp_path / "streamed", inputs, scoring, ENOUGH_GIB) == resident
    assert len(passes) == -(-entries // at_once)


def padded_tokens(inputs: Path, run_dir: Path) -> int:
    data = CalibrationData(inputs / "parent", sequences=inputs / "sequences.jsonl", batch_size=2)
    return sum(len(batch) * len(batch[0]) for batch in data.read_batches(run_dir))


def count_passes(monkeypatch) -> list[int]:
    from lit_puzzle.model.streaming import StreamedModel

    firsts: list[int] = []
    layers = StreamedModel.layers

    def counted(self, first, end, ahead):
        firsts.append(first)
        yield from layers(self, first, end, ahead)

    monkeypatch.setattr(StreamedModel, "layers", counted)
    return firsts


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("calls", [1, 4, 17, 30])
def test_a_killed_run_goes_on_to_the_same_scores(inputs, tmp_path, monkeypatch, depth, calls):
    """Killed after a number of batches through a layer: inside a candidate, between candidates, between layers."""
    whole = run(tmp_path / "whole", inputs, DEPTHS[depth], ENOUGH_GIB)
    stop_after(monkeypatch, calls, lambda: run(tmp_path / "killed", inputs, DEPTHS[depth], ENOUGH_GIB))
    assert (tmp_path / "killed" / "hidden_states.0").is_dir()
    assert run(tmp_path / "killed", inputs, DEPTHS[depth], ENOUGH_GIB) == whole


def stop_after(monkeypatch, calls: int, work: Callable[[], object]) -> None:
    """Stop work that runs batches through layers at the given number of them, as by kill -9."""
    through, left = layer_pass.LayerPass.through, [calls]

    def stopping(self, *given):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return through(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(layer_pass.LayerPass, "through", stopping)
        with pytest.raises(Killed):
            work()


def test_small_budgets_are_refused_with_the_number_needed(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"memory_gib=0\.01 was given; .* needs at least \d+\.\d\d GiB"):
        run(tmp_path / "run", inputs, DEPTHS["end"], 0.01)
    scoring = ScoringSettings(memory=Memory(disk_gib=0))
    with pytest.raises(ValueError, match=r"disk_gib=0 was given; the hidden states of one candidate need \d"):
        run(tmp_path / "run", inputs, scoring, ENOUGH_GIB)


def test_evaluations_need_the_whole_parent(inputs, tmp_path):
    from lit_puzzle.evaluate.long_context import LongContextAccuracy

    data = CalibrationData(inputs / "parent", sequences=inputs / "sequences.jsonl")
    task = LongContextAccuracy.__new__(LongContextAccuracy)
    task.name = "far"
    fabric = FabricSettings(memory_gib=ENOUGH_GIB)
    with pytest.raises(ValueError, match="'far' generates with the whole parent"):
        score(tmp_path, inputs / "parent", inputs / "library", data, fabric, evaluations=[task])
