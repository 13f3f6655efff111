"""KL at the end without one expert, against really masking it in the whole model; killed and resumed; bad input."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.importance_runs import write_sequences
from helpers.streamed_runs import ENOUGH_GIB
from torch import Tensor

from lit_puzzle.cli import main
from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.model.blocks import with_own_blocks
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.model.loading import load_model
from lit_puzzle.run.recipe import PACKAGED_RECIPES
from lit_puzzle.scoring import final_kl as stage
from lit_puzzle.scoring.evidence import Routed
from lit_puzzle.scoring.final_kl import final_kl, removals_of
from lit_puzzle.scoring.replace_block import ReplaceOneBlock
from lit_puzzle.scoring.score_files import ScoreFiles
from lit_puzzle.scoring.settings import Memory
from lit_puzzle.spec import BlockSpec
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.training.fabric import FabricSettings

EXACT = FabricSettings(accelerator="cpu", precision="64-true")
FILES = ("importance.json", "importance.safetensors")


@pytest.fixture
def parent(tiny_model: Any, tmp_path: Path) -> Path:
    """In layer 1 no token is routed to expert 5; in layer 2 expert 3 is rare."""
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.router.bias[5] = -1e4
        tiny_model.model.layers[2].mlp.router.bias[3] = -0.02
    tiny_model.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    return write_sequences(tmp_path / "sequences.jsonl")


def run(folder: Path, parent: Path, sequences: Path, fabric: FabricSettings = EXACT, **options: Any) -> Importance:
    folder.mkdir(exist_ok=True)
    data = CalibrationData(parent, sequences=sequences, batch_size=2)
    options["results"] = results = final_kl(folder, parent, data, fabric, **options)
    found = Importance.load(folder)
    found.check_values()
    assert results["tokens"] == found.tokens and results["experts_not_measured"] == sum(map(len, found.not_measured))
    return found


@torch.no_grad()
def brute_force(parent: Path, rows: list[list[int]], counted: list[slice]) -> list[Tensor]:
    """For every expert one more run of the whole model on every sequence by itself, its router logit at -inf."""
    model = load_model(parent, "float64", "eager")

    def log_probs() -> Tensor:
        found = [model(torch.tensor([row])).logits[0, which] for row, which in zip(rows, counted, strict=True)]
        return torch.cat(found).log_softmax(dim=-1)

    own, scores = log_probs(), []
    for layer in model.model.layers:
        bias = layer.mlp.router.bias
        scores.append(torch.zeros(len(bias), dtype=torch.float64))
        for expert in range(len(bias)):
            before = bias[expert].clone()
            bias[expert] = -math.inf
            scores[-1][expert] = (own.exp() * (own - log_probs())).sum(dim=-1).mean()
            bias[expert] = before
    return scores


def test_scores_equal_really_masking_each_expert_in_the_whole_model(parent, sequences, tmp_path):
    rows = [json.loads(line)["input_ids"] for line in sequences.read_text().splitlines()]
    found = run(tmp_path / "run", parent, sequences)
    assert (found.fingerprint, found.method, found.tokens) == (fingerprint(parent), "final_kl", 63)
    assert 5 in found.not_measured[1] and sum(map(len, found.not_measured)) < 6
    for layer, expected in enumerate(brute_force(parent, rows, [slice(None)] * len(rows))):
        measured = ~found.scores[layer].isnan()
        assert expected[~measured].abs().sum() < 1e-12  # that nothing changes is no score of 0
        torch.testing.assert_close(found.scores[layer][measured], expected[measured], rtol=1e-9, atol=1e-13)
        assert expected[measured].max() > 1e-4


def test_only_generated_tokens_count_and_prompts_still_matter(parent, tmp_path):
    """Tokens of prompts are not scored, but an expert that only they use changes what is."""
    rows = [torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
    lines = [json.dumps({"input_ids": row, "prompt_tokens": 7}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = run(tmp_path / "run", parent, tmp_path / "rows.jsonl")
    assert found.tokens == 3 * 5
    expected = brute_force(parent, rows, [slice(6, 11)] * 3)[0]
    measured = ~found.scores[0].isnan()
    torch.testing.assert_close(found.scores[0][measured], expected[measured], rtol=1e-9, atol=1e-13)
    assert run(tmp_path / "all", parent, tmp_path / "rows.jsonl", score_prompts=True).tokens == 3 * 12


def test_sequences_without_a_routed_token_are_not_run(parent, sequences, tmp_path, monkeypatch):
    """And the scores are those of running all of them."""
    rows_run: list[int] = []
    plain = ReplaceOneBlock._run

    def counted(self: Any, hidden_BTD: Tensor, batch: Any, first: int, last: int | None) -> Tensor:
        rows_run.append(len(hidden_BTD))
        return plain(self, hidden_BTD, batch, first, last)

    monkeypatch.setattr(ReplaceOneBlock, "_run", counted)
    found = run(tmp_path / "run", parent, sequences)
    some = sum(rows_run)
    rows_run.clear()
    monkeypatch.setattr(Routed, "_hook", _everywhere(Routed._hook))
    all_of_them = run(tmp_path / "all", parent, sequences)
    assert some < sum(rows_run)
    for one, other in zip(found.scores, all_of_them.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14, equal_nan=True)


def _everywhere(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Mark all sequences as having a routed token."""

    def hook(self: Routed, layer: int, mask_N: Tensor, rows: int | None = None) -> Callable[..., None]:
        count = plain(self, layer, mask_N, rows)

        def then_all(*arguments: Any) -> None:
            count(*arguments)
            for entry, marked in self.rows.items():
                if entry.layer == layer:
                    marked[-1].fill_(True)

        return then_all

    return hook


class Killed(Exception):
    pass


@pytest.mark.parametrize("memory_gib", [None, ENOUGH_GIB])
def test_a_killed_run_goes_on_behind_the_last_expert_to_the_same_bits(
    parent, sequences, tmp_path, monkeypatch, memory_gib
):
    fabric = FabricSettings(accelerator="cpu", memory_gib=memory_gib)
    run(tmp_path / "whole", parent, sequences, fabric)
    written, plain = list[str](), ScoreFiles.write

    def write(self: ScoreFiles, name: str, values: Any) -> None:
        if len(written) == 11:
            raise Killed
        written.append(name)
        plain(self, name, values)

    with monkeypatch.context() as patched:
        patched.setattr(ScoreFiles, "write", write)
        with pytest.raises(Killed):
            run(tmp_path / "killed", parent, sequences, fabric)
    again: list[str] = []

    def write_again(self: ScoreFiles, name: str, values: Any) -> None:
        again.append(name)
        plain(self, name, values)

    monkeypatch.setattr(ScoreFiles, "write", write_again)
    run(tmp_path / "killed", parent, sequences, fabric)
    assert len(again) == 4 * 8 - 11 and not set(again) & set(written)
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes() for name in FILES)
    assert not list((tmp_path / "killed").glob("hidden_states*"))


def test_a_parent_read_layer_by_layer_and_files_of_states_give_the_same_scores(parent, sequences, tmp_path):
    whole = run(tmp_path / "whole", parent, sequences, FabricSettings(accelerator="cpu"))
    streamed = run(tmp_path / "read", parent, sequences, FabricSettings(accelerator="cpu", memory_gib=ENOUGH_GIB))
    tight = Memory(hidden_gib=0.0, log_probs_gib=0.0)
    on_disk = run(tmp_path / "disk", parent, sequences, FabricSettings(accelerator="cpu"), memory=tight)
    assert whole.not_measured == streamed.not_measured == on_disk.not_measured
    for one, other, third in zip(whole.scores, streamed.scores, on_disk.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7, equal_nan=True)
        torch.testing.assert_close(one, third, rtol=1e-3, atol=1e-7, equal_nan=True)


def test_layers_may_have_few_experts(tiny_config, sequences, tmp_path):
    """Fewer than top-k + 1: one less is chosen; the only one of a layer has no score."""
    blocks = [{"num_local_experts": n, "sliding_window": w} for n, w in ((8, 8), (3, None), (2, 8), (1, None))]
    torch.manual_seed(0)
    model = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(tiny_config(), blocks))
    model.save_pretrained(tmp_path / "child")
    found = run(tmp_path / "run", tmp_path / "child", sequences)
    assert [len(scores_E) for scores_E in found.scores] == [8, 3, 2, 1] and found.not_measured[3] == (0,)
    assert found.scores[2].min() > 0
    assert found.keep([2, 2, 1, 1])[3] == (0,)
    assert len(with_own_blocks(model).config.block_configs) == 4


def test_removals():
    found = removals_of([BlockSpec((0, 1, 2), 8), BlockSpec((0,), None)])
    assert [(entry.layer, entry.block.experts, entry.block.window_tokens) for entry in found] == [
        (0, (1, 2), 8),
        (0, (0, 2), 8),
        (0, (0, 1), 8),
    ]


def test_bad_input_is_refused_before_the_parent_is_loaded(parent, sequences, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(stage, "open_parent", None)
    tiny_model.save_pretrained(tmp_path / "other")
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"the data is of the parent .*other, .* name the same folder"):
        final_kl(tmp_path / "run", parent, CalibrationData(tmp_path / "other", sequences=sequences), EXACT)
    one = tmp_path / "one.jsonl"
    one.write_text(sequences.read_text().splitlines()[0])
    with pytest.raises(ValueError, match="one sequence was given"):
        final_kl(tmp_path / "run", parent, CalibrationData(parent, sequences=one), EXACT)


def test_the_packaged_parent_is_scored_from_any_folder(sequences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = Path("lit_puzzle/assets/tiny_parent")
    assert len(run(tmp_path / "run", packaged, sequences).scores) == 6 and not packaged.exists()


def test_a_run_with_other_sequences_is_not_gone_on_with(parent, sequences, tmp_path):
    run(tmp_path / "run", parent, sequences)
    other = tmp_path / "other.jsonl"
    other.write_text(sequences.read_text().replace("[", "[7, ", 1))
    with pytest.raises(ValueError, match=r"was started with another data\.sequences"):
        run(tmp_path / "run", parent, other)


def test_a_damaged_score_is_named_before_the_parent_is_loaded(parent, sequences, tmp_path, monkeypatch):
    run(tmp_path / "run", parent, sequences)
    names = sorted((tmp_path / "run" / "candidates").iterdir())
    names[0].unlink()
    names[1].write_text("")
    monkeypatch.setattr(stage, "open_parent", None)
    with pytest.raises(ValueError, match=rf"{names[1].name}.* Remove it; the same command scores this candidate again"):
        run(tmp_path / "run", parent, sequences)


@pytest.mark.slow
def test_two_processes_equal_one(parent, sequences, tmp_path):
    """The second of them has a batch less, and experts that none of its sequences is routed to."""
    build_tokenizer().save_pretrained(parent)
    recipe = tmp_path / "recipe.yaml"
    content = {
        "base": str(PACKAGED_RECIPES / "final_kl.yaml"),
        "run_dir": str(tmp_path / "one"),
        "parent": str(parent),
        "fabric": {"accelerator": "cpu", "precision": "64-true"},
        "data": {"init_args": {"sequences": str(sequences), "batch_size": 2}},
    }
    recipe.write_text(yaml.safe_dump(content))
    main(["run", str(recipe)])
    command = [sys.executable, "-m", "lit_puzzle", "run", str(recipe), f"--run_dir={tmp_path / 'two'}"]
    subprocess.run([*command, "--fabric.devices=2"], check=True)
    one, two = (Importance.load(tmp_path / name) for name in ("one", "two"))
    assert one.not_measured == two.not_measured and one.tokens == two.tokens
    for ours, theirs in zip(one.scores, two.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14, equal_nan=True)
