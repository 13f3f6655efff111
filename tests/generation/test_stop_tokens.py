"""End tokens of a loaded model and of its folder are the same, and are needed."""

import json
import shutil
from pathlib import Path

import pytest

from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.stop_tokens import end_and_pad, end_tokens_of

PARENT = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_parent"


@pytest.mark.parametrize(
    ("configured", "expected"), [([5, 6], [5, 6]), (6, [5, 6]), ([40, 9], [5, 9, 40]), (None, [5])]
)
def test_a_folder_and_its_model_agree(tmp_path, configured, expected):
    folder = shutil.copytree(PARENT, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": configured}))
    model, tokenizer = load_policy(folder, "float32", "cpu")
    assert tokenizer.eos_token_id == 5
    assert end_and_pad(model, tokenizer) == (expected, 0) and end_tokens_of(folder, tokenizer) == expected


def test_a_folder_without_a_generation_config(tmp_path):
    folder = shutil.copytree(PARENT, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [40, 9]}))
    model, tokenizer = load_policy(folder, "float32", "cpu")
    assert end_and_pad(model, tokenizer)[0] == end_tokens_of(folder, tokenizer) == [5, 9, 40]
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert end_tokens_of(folder, tokenizer) == [5]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names no end token"):
        end_tokens_of(folder, tokenizer)
