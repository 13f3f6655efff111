"""Importance of whole models under Lightning: brute force on the true inputs, one = two processes, bad input."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.brute_force import brute_force
from helpers.importance_runs import run_importance
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_puzzle.data.batch_validation import check_rows
from lit_puzzle.data.sequence_file import sequences_of
from lit_puzzle.importance.expert_scores import LeaveOneOut
from lit_puzzle.importance.importance import ExpertImportance, summary
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.importance.scored_layers import score_layers
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM


def test_whole_model_equals_brute_force_and_keeps_its_output(tiny_model):
    """Every layer on its true inputs inside the parent, padding on the right, float32."""
    ids, mask = _tiny_batch()
    inputs: dict[int, Tensor] = {}
    for index, decoder in enumerate(tiny_model.model.layers):
        decoder.mlp.register_forward_hook(lambda _m, args, _o, index=index: inputs.__setitem__(index, args[0]))
    with torch.no_grad():
        plain = tiny_model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = [brute_force(layer.mlp, inputs[i], mask.bool()) for i, layer in enumerate(tiny_model.model.layers)]
    scored = score_layers(tiny_model, LeaveOneOut(), chunk_tokens=20)
    for layer in scored:
        layer.counted_BT = mask.bool()
    with torch.no_grad():
        output = tiny_model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(output, plain, rtol=2e-5, atol=2e-5)
    for layer, scores in zip(scored, expected, strict=True):
        torch.testing.assert_close(layer.sums_2E[0] / layer.sums_2E[1], scores.double(), rtol=2e-5, atol=1e-9)


def _tiny_batch(seed: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 128, (3, 21), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(21) < torch.tensor([[21], [13], [4]])).long()
    return ids * mask, mask


def run(folder: Path, parent: Path, sequences: Path, **options) -> Importance:
    module, importance = run_importance(folder, parent, sequences, **options), Importance.load(folder)
    assert module.results["tokens"] == importance.tokens
    return importance


def test_file_holds_the_brute_force_scores_of_all_sequences(parent, sequences, tmp_path, tiny_model):
    importance = run(tmp_path / "run", parent, sequences, attn_implementation="eager")
    rows = [row for row, _ in sequences_of(sequences, parent)]
    assert importance.tokens == sum(map(len, rows)) == 63
    assert (importance.fingerprint, importance.method) == (fingerprint(parent), "leave_one_out")
    inputs: list[Tensor] = []
    tiny_model.model.layers[2].mlp.register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
    with torch.no_grad():
        for row in rows:
            tiny_model.model(input_ids=torch.tensor([row]))
    packed = torch.cat(inputs, dim=1)
    expected = brute_force(tiny_model.model.layers[2].mlp, packed, torch.ones(packed.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(importance.scores[2], expected.double(), rtol=2e-5, atol=1e-9)


def test_linear_memory_attention_gives_the_same_scores(parent, sequences, tmp_path):
    eager = run(tmp_path / "a", parent, sequences, attn_implementation="eager")
    linear = run(tmp_path / "b", parent, sequences)
    for one, other in zip(eager.scores, linear.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_mixed_expert_counts(tiny_config, sequences, tmp_path):
    """A puzzle child: one tensor per layer, of its own length; a layer with fewer experts than top-k included."""
    blocks = [{"num_local_experts": n, "sliding_window": w} for n, w in ((8, 8), (3, None), (2, 8), (1, None))]
    config = GptOssPuzzleConfig.from_parent(tiny_config(), blocks)
    torch.manual_seed(0)
    GptOssPuzzleForCausalLM(config).save_pretrained(tmp_path / "child")
    importance = run(tmp_path / "run", tmp_path / "child", sequences)
    assert [len(scores) for scores in importance.scores] == [8, 3, 2, 1]
    assert all(scores.min() > 0 for scores in importance.scores[1:])
    assert importance.keep([2, 3, 1, 1])[1] == (0, 1, 2)


TWO_PROCESSES = """
import sys
from pathlib import Path
from lightning import Trainer
from torch.distributed.tensor import DTensor
from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.importance.importance import ExpertImportance
from lit_puzzle.training.sharding import Sharded

if __name__ == "__main__":
    folder, parent, sequences = sys.argv[1:]
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=2, strategy=Sharded(), logger=False,
        enable_progress_bar=False, enable_checkpointing=False, inference_mode=False,
    )
    module = ExpertImportance(Path(parent))
    trainer.validate(module, CalibrationData(Path(parent), sequences=Path(sequences), batch_size=2), verbose=False)
    weight = module.model.model.layers[0].mlp.moe.experts.down_proj
    assert isinstance(weight, DTensor) and weight.to_local().numel() * 2 == weight.numel()
"""


@pytest.mark.slow
def test_two_sharded_processes_equal_one(parent, sequences, tmp_path):
    one = run(tmp_path / "one", parent, sequences)
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    (tmp_path / "two").mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(tmp_path / "two"), str(parent), str(sequences)]
    subprocess.run(command, check=True, env=environment, timeout=300)
    two = Importance.load(tmp_path / "two")
    assert two.tokens == one.tokens == 63
    for expected, scores in zip(one.scores, two.scores, strict=True):
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_batches_the_parent_cannot_read_are_refused():
    ids = torch.tensor([[1, 2, 3]])
    good = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    check_rows(good, vocab_size=4, context_tokens=3)
    with pytest.raises(ValueError, match="3 tokens was given; the parent's context holds 2"):
        check_rows(good, vocab_size=4, context_tokens=2)
    with pytest.raises(ValueError, match=r"1\.\.3 were given; the parent knows 0\.\.2"):
        check_rows(good, vocab_size=3, context_tokens=3)
    with pytest.raises(ValueError, match="scored_mask has shape"):
        check_rows(good | {"scored_mask": ids[:, :2]}, vocab_size=4, context_tokens=3)


def test_data_without_a_scored_token_is_refused(parent, tmp_path):
    ids = torch.tensor([[5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "scored_mask": torch.zeros_like(ids)}
    data: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="No token was scored"):
        trainer.validate(ExpertImportance(parent), data, verbose=False)
    assert not (tmp_path / "importance.json").exists()


def test_weights_that_overflow_are_named(tiny_model, tmp_path, sequences):
    tiny_model.model.layers[1].mlp.experts.down_proj.data.fill_(3e38)
    tiny_model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="Scores of layer 1 are not finite after batch 0"):
        run(tmp_path / "run", tmp_path / "broken", sequences)
    assert not (tmp_path / "run" / "importance.json").exists()


def test_bad_arguments_are_refused(tmp_path, parent, sequences):
    with pytest.raises(ValueError, match=r"parent checkpoint .* does not exist"):
        run(tmp_path / "run", tmp_path / "nowhere", sequences)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1"):
        ExpertImportance(parent, chunk_tokens=0)


def test_summary_counts_and_shares():
    scores = (torch.tensor([3.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert summary(scores, 10) == {
        "tokens": 10,
        "layers": 2,
        "experts": 7,
        "experts_of_score_0": 2,
        "better_half_share/min": 0.75,
        "better_half_share/max": 1.0,
    }
