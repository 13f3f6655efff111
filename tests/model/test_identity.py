"""The identity of a checkpoint folder: which changes it sees, in which part, and which it does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lit_puzzle.model.identity import checkpoint_identity, weights_identity
from lit_puzzle.run.folder import PACKAGE

CHILD = PACKAGE / "assets" / "tiny_child"


def rewrite(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def one_value(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": one_value,
    "config": lambda folder: rewrite(folder / "config.json", lambda config: config.update(use_cache=False)),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "chat_template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "generation_config": lambda folder: rewrite(
        folder / "generation_config.json", lambda config: config.update(eos_token_id=[1])
    ),
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_change_is_seen_in_its_part_only(part: str, tmp_path: Path) -> None:
    shutil.copytree(CHILD, tmp_path / "child")
    before = checkpoint_identity(tmp_path / "child").content
    CHANGES[part](tmp_path / "child")
    after = checkpoint_identity(tmp_path / "child").content
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {part}


def test_a_copy_in_other_words_is_the_same(tmp_path: Path) -> None:
    shutil.copytree(CHILD, tmp_path / "child")
    (tmp_path / "child" / "README.md").write_text("moved")
    for name in ("config.json", "tokenizer_config.json"):
        rewrite(tmp_path / "child" / name, lambda content: None)
    assert checkpoint_identity(tmp_path / "child").content == checkpoint_identity(CHILD).content


def test_weights_are_those_of_the_whole_identity() -> None:
    assert weights_identity(CHILD).content == {"weights": checkpoint_identity(CHILD).content["weights"]}
