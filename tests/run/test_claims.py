"""An input that is replaced between a stopped attempt and the next is refused by name, in every stage of one process.

The stopped attempt is a complete run whose record is removed: its results are there, as after a kill at the end.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_puzzle.cli import main
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.run.folder import PACKAGE

ASSETS = PACKAGE / "assets"


def other_weights(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file)


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ reasoning_effort }} {{ messages[0].content }}")


def other_text(file: Path) -> None:
    lines = file.read_text().splitlines(True)
    file.write_text("".join(lines[::-1]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the tiny models, sequences of tokens, prompts and made-up importance."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("tiny_parent", "tiny_child"):
        shutil.copytree(ASSETS / name, folder / name)
    rows = [{"input_ids": [number, 7, 8, 9]} for number in range(10, 14)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": f"What is {number} plus 2?"} for number in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    parent = folder / "tiny_parent"
    torch.manual_seed(0)
    scores = tuple(torch.rand(count, dtype=torch.float64) for count, _ in Checkpoint(parent).blocks)
    (folder / "importance").mkdir()
    Importance(fingerprint(parent), "frequency", 1, scores).save(folder / "importance")
    return folder


Change = tuple[str, Callable[[Path], object], str]
STAGES: dict[str, tuple[list[str], list[Change]]] = {
    "generate": (
        [
            "--parent={0}/tiny_parent",
            "--prompts.environments=null",
            "--prompts.file={0}/prompts.jsonl",
            "--prompts.num_prompts=4",
            "--sampling.max_new_tokens=2",
            "--shard_size=2",
        ],
        [
            ("tiny_parent", other_weights, "another parent: .* weights"),
            ("tiny_parent", other_template, "another parent: .* chat_template"),
            ("prompts.jsonl", other_text, "another prompts"),
        ],
    ),
    "importance": (
        [
            "--model.init_args.parent={0}/tiny_parent",
            "--data.init_args.parent={0}/tiny_parent",
            "--data.init_args.prompts=null",
            "--data.init_args.sequences={0}/rows.jsonl",
        ],
        [("tiny_parent", other_weights, "another parent"), ("rows.jsonl", other_text, "another data.sequences")],
    ),
    "calibrate_kv": (
        [
            "--model.init_args.checkpoint={0}/tiny_child",
            "--data.init_args.prompts=null",
            "--data.init_args.sequences={0}/rows.jsonl",
        ],
        [("tiny_child", other_weights, "another checkpoint"), ("rows.jsonl", other_text, "another data.sequences")],
    ),
    "library": (
        ["--parent={0}/tiny_parent", "--importance={0}/importance"],
        [("importance/importance.json", lambda file: file.write_text(file.read_text() + " "), "another importance")],
    ),
    "evaluate": (
        ["--checkpoint={0}/tiny_child", "--held_out.prompts_per_effort=2", "--sampling.max_new_tokens=2"],
        [
            ("tiny_child", other_weights, "another checkpoint: .* weights"),
            ("tiny_child", other_template, "another checkpoint: .* chat_template"),
        ],
    ),
    "export": (
        ["--checkpoint={0}/tiny_child", "--kv_scales=null"],
        [("tiny_child", other_weights, "another checkpoint")],
    ),
}


SLOW = ("importance", "calibrate_kv", "generate")


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.slow if stage in SLOW else ()) for stage in STAGES]
)
def test_a_replaced_input_is_refused_by_name(
    stage: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(world, tmp_path / "world"))
    words, changes = STAGES[stage]
    command = ["run", f"recipes/{stage}.yaml", f"--run_dir={tmp_path / 'run'}"]
    command += [word.format(copy) for word in words]
    main(command)
    made = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for name, change, message in changes:
        (tmp_path / "run" / "run.json").unlink()
        change(copy / name)
        with pytest.raises(SystemExit) as stopped:
            main(command)
        *_, said = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2
        assert re.search(f"started with {message}", said), said
        assert (tmp_path / "run" / "inputs.json").read_bytes() == made[tmp_path / "run" / "inputs.json"]
        shutil.rmtree(copy)
        shutil.copytree(world, copy)
        (tmp_path / "run" / "run.json").write_bytes(made[tmp_path / "run" / "run.json"])
    (tmp_path / "run" / "run.json").unlink()
    main(command)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed"] is True
