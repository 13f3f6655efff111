"""docs/metrics.md: every key that a short run of a stage logs is in the section of that stage, and no key twice."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import block_runs, distillation_runs, on_policy_runs, recovery_runs
from helpers.recovery_runs import forked

from lit_puzzle.callbacks.fp8_kv_scales import FP8KVScales
from lit_puzzle.callbacks.generation_length import GenerationLength
from lit_puzzle.rl.length_settings import BudgetSettings, EndingSettings, GroupLengthSettings, OverlongSettings
from lit_puzzle.rl.settings import RewardSettings
from lit_puzzle.training.checkpoints import BestCheckpoint, UpdateCheckpoint
from lit_puzzle.training.loggers import CSV
from lit_puzzle.training.metrics_file import MetricsFile

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def rows(section: str) -> list[list[str]]:
    """The keys of every row of a section's tables, whole: `/std` and `p50` take the place of the last part."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    found = []
    for line in text.splitlines():
        names = re.findall(r"`([^`]+)`", line.split(" | ")[0]) if line.startswith("| `") else []
        if names:
            first, *others = names
            stem = first.rpartition("/")[0]
            found.append(
                [first, *(name if "/" in name.lstrip("/") else f"{stem}/{name.lstrip('/')}" for name in others)]
            )
    return found


def pattern(key: str) -> str:
    """A placeholder stands for one part, three dots for the rest."""
    escaped = re.escape(key).replace(re.escape("..."), ".+")
    return re.sub(r"<[^>]+>", "[^/]+", escaped)


def undocumented(logged: Path, *sections: str) -> list[str]:
    """Columns of a log that no row of these sections names."""
    keys = {name for _, metrics in MetricsFile(logged / "logs" / "metrics.csv").rows() for name in metrics}
    known = [pattern(key) for section in ("Loggers", *sections) for keys in rows(section) for key in keys]
    assert len(keys) > 3
    return sorted(key for key in keys if not any(re.fullmatch(one, key) for one in known))


def test_placeholders_and_endings_are_read() -> None:
    keys = dict.fromkeys(key for row in rows("RL recovery") for key in row)
    assert {"train/rewards/<reward>/mean", "train/rewards/<reward>/std", "length/<effort>/p95"} <= set(keys)
    assert re.fullmatch(pattern("length/<effort>/<environment>/..."), "length/low/chains/p50")
    assert not re.fullmatch(pattern("train/<layer>/<candidate>"), "train/loss")


@pytest.mark.parametrize(
    "section", ["RL recovery", "Distillation", "On-policy distillation", "FP8 KV scales", "Tiny parent"]
)
def test_no_key_is_defined_twice(section: str) -> None:
    keys = [key for row in rows(section) for key in row]
    assert len(keys) == len(set(keys)) > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics")


@pytest.mark.slow
def test_rl_recovery(folder: Path, tiny_config: Any) -> None:
    child = recovery_runs.make_child(folder / "child", tiny_config(num_hidden_layers=2))
    rewards = RewardSettings(
        finished=0.5,
        length=0.5,
        budget=BudgetSettings(weight=1.0),
        group_length=GroupLengthSettings(weight=0.5),
        overlong=OverlongSettings(weight=0.5, buffer_tokens=2),
        endings=EndingSettings(looping=0.5, no_analysis=0.5),
    )

    def work(_: int) -> None:
        callbacks = [GenerationLength(child, window=1, max_tokens=6), UpdateCheckpoint(4), BestCheckpoint()]
        settings = {"logger": CSV(folder / "rl"), "log_every_n_steps": 1, "val_check_interval": 4}
        trainer = recovery_runs.make_trainer(folder / "rl", 1, 4, callbacks, **settings)
        module = recovery_runs.make_module(child, rewards=rewards)
        trainer.fit(module, datamodule=recovery_runs.make_data())

    assert forked(1, work) == [0]
    assert undocumented(folder / "rl", "RL recovery") == []
    assert "train/loss" in undocumented(folder / "rl", "Tiny parent")


@pytest.mark.slow
def test_distillation(folder: Path, tiny_config: Any) -> None:
    models = distillation_runs.make_models(folder, tiny_config)

    def work(_: int) -> None:
        settings = {"logger": CSV(folder / "kd"), "log_every_n_steps": 1}
        distillation_runs.fit(folder / "kd", models, 4, callbacks=[FP8KVScales()], trainer=settings)

    assert forked(1, work) == [0]
    assert undocumented(folder / "kd", "Distillation", "FP8 KV scales") == []


@pytest.mark.slow
def test_blockwise_distillation(folder: Path, tiny_config: Any) -> None:
    (folder / "blocks").mkdir()
    inputs = block_runs.make_inputs(folder / "blocks", tiny_config)

    def work(_: int) -> None:
        settings = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "val_check_interval": 3}
        logged = {"logger": CSV(folder / "bld"), "log_every_n_steps": 1}
        trainer = recovery_runs.make_trainer(folder / "bld", 1, 4, [UpdateCheckpoint(2)], **settings, **logged)
        trainer.fit(block_runs.make_module(inputs), datamodule=block_runs.make_data(inputs))

    assert forked(1, work) == [0]
    assert undocumented(folder / "bld", "Distillation") == []


@pytest.mark.slow
def test_on_policy_distillation(folder: Path, tiny_config: Any) -> None:
    (folder / "pair").mkdir()
    pair = on_policy_runs.make_pair(folder / "pair", tiny_config)

    def work(_: int) -> None:
        settings = {"logger": CSV(folder / "on_policy"), "log_every_n_steps": 1}
        callbacks = [GenerationLength(pair.child, window=1, max_tokens=6)]
        on_policy_runs.fit(folder / "on_policy", pair, 3, callbacks=callbacks, trainer=settings)

    assert forked(1, work) == [0]
    assert undocumented(folder / "on_policy", "On-policy distillation", "RL recovery") == []
