"""The callback: scales of exactly the child that a run saves, in distillation and RL, on one and two processes."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import distillation_runs, recovery_runs
from helpers.distillation_runs import Models, make_data, make_models
from helpers.keys_and_values import keys_and_values
from helpers.recovery_runs import forked, kill_self, make_child, make_trainer
from helpers.scaled_layers import all_scaled, scaled
from lightning.pytorch.loggers import CSVLogger

from lit_puzzle.callbacks.fp8_kv_scales import FP8KVScales
from lit_puzzle.cli import main
from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.data.packed_files import PackedSequences
from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.data.sequence_file import sequences_of
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.kv_cache.calibrate import KVCalibration
from lit_puzzle.kv_cache.scales import KVScales
from lit_puzzle.kv_cache.settings import ScaleSettings
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.loading import load_model
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.tiny.world import Chains
from lit_puzzle.training.settings import LoraSettings, TrainingSettings

EXACT = ScaleSettings(rounding="none")
TINY_CHILD = PACKAGE / "assets" / "tiny_child"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Models:
    return make_models(tmp_path_factory.mktemp("kd"), tiny_config)


def held_out_documents(folder: Path) -> list[torch.Tensor]:
    """The documents that a distillation validates on, one by one."""
    packed = PackedSequences(folder / "packed" / "validation")
    batch = packed.batch(range(len(packed)))
    rows = zip(batch["input_ids"], batch["document_ids"], strict=True)
    return [ids[numbers == number] for ids, numbers in rows for number in numbers.unique().tolist() if number >= 0]


def check_scales(folder: Path, rows: list[torch.Tensor]) -> KVScales:
    """The scales are those of the saved child, by k_proj, v_proj and RoPE computed by hand on each document."""
    scales = KVScales.load(folder / "kv_scales")
    assert scales.fingerprint == fingerprint(folder / "child")
    assert scales.tokens == sum(map(len, rows)) > 50
    expected = keys_and_values(load_model(folder / "child", "float32").eval(), rows)
    for both, (k, v) in zip(all_scaled(scales.layers), expected, strict=True):
        torch.testing.assert_close(both.k.amax, k.abs().max(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both.v.amax, v.abs().max(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both.k.scale * 448, both.k.amax, rtol=1e-6, atol=0)
    return scales


VARIANTS: dict[str, dict[str, Any]] = {
    "weights": {"ema_decay": 0.8},
    "adapters": {"training": TrainingSettings(lora=LoraSettings(rank=2))},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_distillation_writes_the_scales_of_what_it_saves(models: Models, tmp_path: Path, variant: str) -> None:
    """Best validated weights (here averaged, or with adapters merged), rounded: not the last, not the first."""

    def work(rank: int) -> None:
        torch.manual_seed(0)
        logger = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
        callbacks = [FP8KVScales(scales=EXACT)]
        distillation_runs.fit(tmp_path, models, 6, callbacks=callbacks, trainer=logger, **VARIANTS[variant])

    assert forked(1, work) == [0]
    scales = check_scales(tmp_path, held_out_documents(tmp_path))
    start = keys_and_values(load_model(models.child, "float32").eval(), held_out_documents(tmp_path))
    for both, (k, _) in zip(all_scaled(scales.layers), start, strict=True):
        assert abs(float(both.k.amax / k.abs().max()) - 1) > 1e-3, "training changed nothing"
    results = json.loads((tmp_path / "results0.json").read_text())
    assert results["kv/tokens"] == scales.tokens and results["kv/overflow"] == 0
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()))
    watched = [row for row in rows if row["kv_start/1/k_amax"]]
    assert [int(row["step"]) for row in watched] == [2, 5]  # a validation after every third update
    for row in watched:
        assert float(row["kv_start/1/k_scale"]) == pytest.approx(float(start[1][0].abs().max()) / 448, rel=1e-4)
    (written,) = (row for row in rows if row["kv/1/k_amax"])
    assert float(written["kv/1/k_amax"]) == pytest.approx(float(scaled(scales.layers[1]).k.amax))
    assert (tmp_path / "kv_scales" / "kv_amax.png").is_file()


@pytest.mark.slow
def test_a_killed_run_remembers_the_scales_of_its_start(models: Models, tmp_path: Path) -> None:
    """The second half logs the numbers of an uninterrupted run, bit for bit."""

    def work(folder: Path, kill: bool) -> None:
        logger = {"logger": CSVLogger(folder, version="kill" if kill else "end"), "log_every_n_steps": 1}
        on_step = (lambda step: kill_self() if step == 5 else None) if kill else None
        distillation_runs.fit(folder, models, 6, on_step=on_step, callbacks=[FP8KVScales(scales=EXACT)], trainer=logger)

    assert forked(1, lambda _: work(tmp_path / "whole", False)) == [0]
    assert forked(1, lambda _: work(tmp_path / "parts", True)) == [-9]
    assert forked(1, lambda _: work(tmp_path / "parts", False)) == [0]
    logged = []
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        rows = list(csv.DictReader(next(folder.rglob("end/metrics.csv")).open()))
        logged.append(
            [{k: v for k, v in row.items() if k.startswith("kv")} for row in rows if row["kv_start/0/k_amax"]]
        )
    assert logged[1] == logged[0][-1:] and len(logged[0]) == 2
    both = [
        (folder / "kv_scales" / "kv_scales.json").read_text() for folder in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert both[0] == both[1]


@pytest.mark.slow
def test_two_sharded_processes_calibrate_what_they_save(models: Models, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        distillation_runs.fit(tmp_path, models, 3, 2, rank, callbacks=[FP8KVScales(scales=EXACT)])

    assert forked(2, work) == [0, 0]
    check_scales(tmp_path, held_out_documents(tmp_path))


@pytest.mark.slow
def test_reinforcement_learning_calibrates_on_what_its_child_generated(tiny_config: Any, tmp_path: Path) -> None:
    """Training is the same as without the callback, bit for bit."""
    child = make_child(tmp_path / "start", tiny_config(num_hidden_layers=2))
    source, sampling = PromptSource([Chains()], num_prompts=6), Sampling(8, temperature=0.0)
    data = CalibrationData(child, source, sampling=sampling, batch_size=4)
    folder = tmp_path / "run"

    def work(_: int) -> None:
        recovery_runs.fit(folder, child, 4, callbacks=[FP8KVScales(data, EXACT)])

    assert forked(1, work) == [0]
    assert forked(1, lambda _: recovery_runs.fit(tmp_path / "without", child, 4)) == [0]
    with_it, without = (torch.load(path / "weights.pt", weights_only=True) for path in (folder, tmp_path / "without"))
    assert all(torch.equal(tensor, without[name]) for name, tensor in with_it.items())
    rows = [row for row, _ in sequences_of(folder / "kv_calibration" / "calibration.jsonl", child)]
    assert len(rows) == 6
    check_scales(folder, [torch.tensor(row) for row in rows])
    assert json.loads((folder / "results.json").read_text())["kv/layers"] == 2


SHORT: dict[str, dict[str, Any]] = {
    "distill": {
        "model.init_args.evaluation.prompts_per_effort": 2,
        "model.init_args.evaluation.max_new_tokens": 4,
        "data.init_args.sequence_tokens": 64,
    },
    "rl_recover": {
        "model.init_args.evaluation.prompts_per_effort": 2,
        "data.init_args.held_out_per_effort": 2,
        "model.init_args.grpo.num_generations": 2,
        "model.init_args.grpo.completions_per_device": 2,
        "model.init_args.grpo.sampling.max_new_tokens": 4,
        "trainer.callbacks.data": "lit_puzzle.data.calibration.CalibrationData",
        "trainer.callbacks.data.init_args.parent": TINY_CHILD,
        "trainer.callbacks.data.init_args.prompts.environments": "[{class_path: lit_puzzle.tiny.world.Chains}]",
        "trainer.callbacks.data.init_args.prompts.num_prompts": 3,
        "trainer.callbacks.data.init_args.sampling.max_new_tokens": 4,
    },
}


@pytest.mark.parametrize("recipe", SHORT)
@pytest.mark.slow
def test_recipes_take_it_from_the_command_line(models: Models, tmp_path: Path, recipe: str) -> None:
    """`--trainer.callbacks+=` and its options, in the shipped recipes."""
    given: dict[str, Any] = {"model.init_args.child": TINY_CHILD, "trainer.max_steps": 2}
    if recipe == "distill":  # documents of a model with the same tokenizer
        given |= {"data.init_args.documents": models.documents, "data.init_args.filter.written_by": "any"}
    given |= {"trainer.callbacks+": "lit_puzzle.callbacks.fp8_kv_scales.FP8KVScales"}
    given |= SHORT[recipe] | {"trainer.callbacks.scales.windowed_layers": "bf16", "run_dir": tmp_path / "run"}
    given |= {"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.val_check_interval": 1}
    words = [f"--{key}={value}" for key, value in given.items()]
    assert forked(1, lambda _: main(["run", f"recipes/{recipe}.yaml", *words])) == [0]
    scales = KVScales.load(tmp_path / "run" / "kv_scales")
    scales.check_checkpoint(fingerprint(tmp_path / "run" / "child"))
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert (results["kv/layers"], results["kv/layers_in_bf16"], results["kv/overflow"]) == (6, 5, 0)
    full = scaled(scales.layers[1])
    assert results["kv/headroom/min"] == min(full.k.headroom, full.v.headroom) >= 0
    header = next((tmp_path / "run").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    kinds = [f"{kind}_{what}" for kind in "kv" for what in ("amax", "scale", "headroom", "overflow")]
    assert {f"kv/1/{kind}" for kind in kinds} == {key for key in header if key.startswith("kv/")}
    assert {f"kv_start/{i}/{kind}" for i in range(6) for kind in kinds} <= set(header)  # all layers are watched


def test_runs_without_a_child_or_documents_are_refused(models: Models, tiny_config: Any, tmp_path: Path) -> None:
    trainer: Any = make_trainer(tmp_path, 1, 1, [])
    trainer.datamodule = make_data(models, validation_one_in=0)
    with pytest.raises(ValueError, match="has none for validation"):
        FP8KVScales().setup(trainer, distillation_runs.make_module(models), "fit")
    trainer.datamodule = recovery_runs.make_data()
    with pytest.raises(ValueError, match=r"the run's data, PromptData, .*CalibrationData"):
        FP8KVScales().setup(trainer, recovery_runs.make_module(models.child), "fit")
    with pytest.raises(ValueError, match=r"was given KVCalibration; .*calibrate_kv\.yaml"):
        FP8KVScales().setup(trainer, KVCalibration(models.child), "fit")
