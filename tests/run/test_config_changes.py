"""Which keys of a recipe a resumed run may change."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lit_puzzle.run.config_changes import compare_configs

UPDATES = "lit_puzzle.training.checkpoints.UpdateCheckpoint"
BEST = "lit_puzzle.training.checkpoints.BestCheckpoint"
BAR = "lightning.pytorch.callbacks.RichProgressBar"
FIT: dict[str, Any] = {
    "command": "fit",
    "run_dir": "runs/a",
    "trainer": {
        "max_steps": 10,
        "devices": 1,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs/a"}},
        "callbacks": [
            {"class_path": UPDATES, "init_args": {"every_n_updates": 5, "keep": 2}},
            {"class_path": BEST, "init_args": {"monitor": "val/loss"}},
            {"class_path": BAR},
        ],
    },
    "model": {"init_args": {"child": "runs/child", "lr": 0.1, "grpo": {"stop": {"max_kl": None}}}},
    "engine": {"name": "server", "server": {"url": "http://a:1/v1", "retries": 5, "model": "m"}},
}


def changed(*keys: str | int, value: Any, config: dict[str, Any] = FIT) -> dict[str, Any]:
    made = deepcopy(config)
    node: Any = made
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    return made


@pytest.mark.parametrize(
    "now",
    [
        changed("trainer", "max_steps", value=20),
        changed("trainer", "logger", value=False),
        changed("engine", "server", value={"url": "http://b:2/v1", "retries": 9, "model": "m"}),
        changed("model", "init_args", "grpo", value={"stop": {"max_kl": 5.0}}),
        changed("trainer", "callbacks", 0, "init_args", value={"every_n_updates": 1, "keep": 9}),
        changed("trainer", "callbacks", value=FIT["trainer"]["callbacks"][:2]),
        changed("trainer", "callbacks", value=[{"class_path": BAR}, *FIT["trainer"]["callbacks"][:2]]),
    ],
)
def test_what_changes_no_result_may_change(now: dict[str, Any]) -> None:
    difference, changes = compare_configs(FIT, now, ())
    assert difference == "" and changes


@pytest.mark.parametrize(
    ("now", "shown"),
    [
        (changed("model", "init_args", "lr", value=0.2), "lr: 0.2"),
        (changed("trainer", "devices", value=2), "devices: 2"),
        (changed("engine", "server", "model", value="n"), "model: n"),
        (changed("trainer", "callbacks", 1, "init_args", "monitor", value="val/accuracy"), "monitor: val/accuracy"),
        (changed("trainer", "callbacks", value=FIT["trainer"]["callbacks"][:1]), f"class_path: {BEST}"),
        (changed("command", value="validate"), "command: validate"),
    ],
)
def test_what_changes_results_is_shown(now: dict[str, Any], shown: str) -> None:
    difference, _ = compare_configs(FIT, now, ())
    assert shown in difference


def test_only_what_matters_is_shown() -> None:
    now = changed("trainer", "max_steps", value=20, config=changed("model", "init_args", "lr", value=0.2))
    difference, changes = compare_configs(FIT, now, ())
    assert "-    lr: 0.1" in difference and "+    lr: 0.2" in difference and "max_steps" not in difference
    assert [(change.key, change.before, change.now) for change in changes] == [
        ("trainer.max_steps", 10, 20),
        ("model.init_args.lr", 0.1, 0.2),
    ]


def test_devices_of_stages_that_divide_their_work_may_change() -> None:
    score = {"command": "score", "run_dir": "a", "fabric": {"devices": 1, "precision": "32-true"}}
    assert compare_configs(score, changed("fabric", "devices", value=4, config=score), ())[0] == ""
    assert compare_configs(score, changed("fabric", "precision", value="bf16-true", config=score), ())[0] != ""
    other = score | {"command": "assemble"}
    assert compare_configs(other, changed("fabric", "devices", value=4, config=other), ())[0] != ""


def test_a_run_folder_may_be_moved() -> None:
    now = deepcopy(FIT) | {"run_dir": "elsewhere/b"}
    now["model"]["init_args"]["scales"] = "elsewhere/b/kv_scales"
    before = changed("model", "init_args", "scales", value="runs/a/kv_scales")
    assert compare_configs(before, now, ())[0] == ""


def test_a_claimed_input_may_be_moved_to_where_something_is(tmp_path: Path) -> None:
    now = changed("model", "init_args", "child", value=str(tmp_path))
    assert compare_configs(FIT, now, {"runs/child"})[0] == ""
    assert "child" in compare_configs(FIT, now, ())[0]
    assert "child" in compare_configs(FIT, changed("model", "init_args", "child", value="nowhere"), {"runs/child"})[0]
