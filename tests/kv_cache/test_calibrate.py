"""Calibration as Lightning runs it: files, two processes, resuming an interrupted run, bad input, the recipe."""

import json
from pathlib import Path

import pytest
import torch
from helpers.keys_and_values import keys_and_values
from helpers.present import all_present, present
from helpers.recovery_runs import forked
from helpers.streamed_runs import ENOUGH_GIB, Killed, layers_run, same_files, stop_at
from lightning import Trainer
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lit_puzzle.cli import main
from lit_puzzle.data.batch_validation import check_packed
from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.data.document_files import Document, write_documents
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.data.sequence_file import sequences_of
from lit_puzzle.kv_cache.calibrate import KVCalibration
from lit_puzzle.kv_cache.report import per_layer, table, totals
from lit_puzzle.kv_cache.scales import KVScales
from lit_puzzle.kv_cache.settings import ScaleSettings
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.training.sharding import Sharded


@pytest.fixture
def checkpoint(tiny_model, tmp_path) -> Path:
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture
def sequences(tmp_path) -> Path:
    """Seven sequences: four batches of two, the last with one; the longest first."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in (21, 5, 13, 8, 16, 7, 9)]
    file = tmp_path / "sequences.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file


def trainer_for(folder: Path, **options) -> Trainer:
    folder.mkdir(exist_ok=True)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(default_root_dir=folder, accelerator="cpu", **({"devices": 1} | quiet | options))


def run(folder: Path, checkpoint: Path, sequences: Path, **options) -> KVScales:
    module = KVCalibration(checkpoint, **options)
    data = CalibrationData(checkpoint, sequences=sequences, batch_size=2)
    trainer_for(folder).validate(module, data, verbose=False)
    scales = KVScales.load(folder)
    assert module.results == totals(scales)
    return scales


def test_files_hold_amax_and_scales_of_all_sequences(checkpoint, sequences, tmp_path, tiny_model):
    scales = run(tmp_path / "run", checkpoint, sequences, scales=ScaleSettings(rounding="none", per_head=True))
    rows = [torch.tensor(row) for row, _ in sequences_of(sequences, checkpoint)]
    assert (scales.tokens, scales.fingerprint) == (79, fingerprint(checkpoint))
    for both, (k, v) in zip(all_present(scales.layers), keys_and_values(tiny_model, rows), strict=True):
        for one, x_NGC in ((both.k, k), (both.v, v)):
            torch.testing.assert_close(one.amax, x_NGC.abs().amax(dim=(0, 2)), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one.scale * 448, one.amax, rtol=1e-6, atol=0)
            assert one.overflow == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "kv_scales.safetensors",
        "kv_scales.json",
        "kv_scales.md",
        "kv_amax.png",
        "kv_amax.svg",
        "outputs.json",
        "calibration_tokens",
    }


def test_metrics_and_table(checkpoint, sequences, tmp_path):
    scales = run(tmp_path / "run", checkpoint, sequences, scales=ScaleSettings(windowed_layers="bf16"))
    values, results = per_layer(scales.layers), totals(scales)
    assert values["kv/1/k_scale"] == float(present(scales.layers[1]).k.scale) and not any(
        "kv/0/" in key for key in values
    )
    assert (results["layers"], results["layers_in_bf16"], results["overflow"]) == (4, 2, 0)
    full = all_present(scales.layers[1::2])
    headrooms = [layer.k.headroom for layer in full] + [layer.v.headroom for layer in full]
    assert results["headroom/min"] == min(headrooms) >= 0
    lines = table(scales, [8, None, 8, None]).splitlines()
    assert lines[6].startswith("| 0 | 8 | bf16 |") and lines[7].startswith("| 1 | full | ")
    assert (tmp_path / "run" / "kv_scales.md").read_text() == table(scales, [8, None, 8, None])


class Stopped(Exception):
    """Interrupts a run."""


class Watched(KVCalibration):
    """Calibration that notes how many batches were counted before each, and stops before one of them."""

    stop_before = -1

    def validation_step(self, batch, batch_idx) -> None:
        if batch_idx == self.stop_before:
            raise Stopped
        self.seen = [*vars(self).get("seen", []), self.batches_done]
        super().validation_step(batch, batch_idx)


def test_a_resumed_run_finds_the_same_scales(checkpoint, sequences, tmp_path):
    whole = run(tmp_path / "whole", checkpoint, sequences, scales=ScaleSettings("mse", "none"))
    module = Watched(checkpoint, scales=ScaleSettings("mse", "none"), save_every_batches=1)
    module.stop_before = 2
    data = CalibrationData(checkpoint, sequences=sequences, batch_size=2)
    with pytest.raises(Stopped):
        trainer_for(tmp_path / "run").validate(module, data, verbose=False)
    state = load_file(tmp_path / "run" / "progress" / "0.safetensors")
    assert int(state["batches"]) == 2 and int(state["tokens"]) == 21 + 16 + 13 + 9
    resumed = Watched(checkpoint, scales=ScaleSettings("mse", "none"))
    trainer_for(tmp_path / "run").validate(resumed, data, verbose=False)
    assert resumed.seen == [2, 2, 2, 3]  # the first two batches were not counted again
    ours = KVScales.load(tmp_path / "run")
    assert ours.tokens == whole.tokens == 79
    for name, scale in whole.tensors().items():
        assert torch.equal(ours.tensors()[name], scale)
    assert (tmp_path / "run" / "kv_scales.json").read_text() == (tmp_path / "whole" / "kv_scales.json").read_text()
    assert not (tmp_path / "run" / "progress").exists()


def test_packed_documents_of_the_parent(tmp_path, tiny_config):
    """The amax equals that of the same documents one by one: packing and padding do not change it."""
    from helpers.distillation_runs import make_models

    models = make_models(tmp_path, tiny_config)
    data = PackedDocuments(models.documents, models.parent, 32, batch_size=2, validation_one_in=6)
    module = KVCalibration(models.child)
    trainer_for(tmp_path / "run").validate(module, data, verbose=False)
    rows = []
    for batch in data.val_dataloader():
        check_packed(batch, 64, 128)
        for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
            rows += [ids[documents == number] for number in documents.unique().tolist() if number >= 0]
    scales = KVScales.load(tmp_path / "run")
    assert scales.tokens == sum(map(len, rows)) == module.results["tokens"]
    for both, (k, v) in zip(all_present(scales.layers), keys_and_values(present(module.model), rows), strict=True):
        torch.testing.assert_close(both.k.amax, k.abs().max(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both.v.amax, v.abs().max(), rtol=1e-4, atol=1e-4)


def test_two_sharded_processes_equal_one(checkpoint, sequences, tmp_path):
    """Three batches for two processes: the second process does not count the repeated batch."""
    rows = sequences.read_text().splitlines(keepends=True)
    sequences.write_text("".join(rows[:5]))
    one = run(tmp_path / "one", checkpoint, sequences, scales=ScaleSettings("mse"))

    def work(rank: int) -> None:
        module = KVCalibration(checkpoint, ScaleSettings("mse"), save_every_batches=1)
        data = CalibrationData(checkpoint, sequences=sequences, batch_size=2)
        options = {"devices": 2, "strategy": Sharded(), "inference_mode": False}
        trainer_for(tmp_path / "two", **options).validate(module, data, verbose=False)
        weight = present(module.model).model.layers[0].mlp.experts.down_proj
        assert isinstance(weight, DTensor) and weight.to_local().numel() * 2 == weight.numel()

    assert forked(2, work) == [0, 0]
    two = KVScales.load(tmp_path / "two")
    assert two.tokens == one.tokens == 63
    for expected, both in zip(all_present(one.layers), all_present(two.layers), strict=True):
        torch.testing.assert_close(both.k.amax, expected.k.amax, rtol=1e-6, atol=0)
        torch.testing.assert_close(both.v.amax, expected.v.amax, rtol=1e-6, atol=0)
        assert torch.equal(both.k.scale, expected.k.scale) and torch.equal(both.v.scale, expected.v.scale)


def test_weights_that_overflow_and_dead_layers_are_named(tiny_model, tmp_path, sequences):
    tiny_model.model.layers[1].self_attn.v_proj.weight.data.fill_(3e38)
    tiny_model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="Values of layer 1 are not finite after batch 0"):
        run(tmp_path / "a", tmp_path / "broken", sequences)
    for parameter in tiny_model.model.layers[1].self_attn.v_proj.parameters():
        parameter.data.zero_()
    tiny_model.save_pretrained(tmp_path / "dead")
    with pytest.raises(ValueError, match=r"amax of V in layer 1 is .* no scale follows"):
        run(tmp_path / "b", tmp_path / "dead", sequences)
    assert not (tmp_path / "b" / "kv_scales.json").exists()


def test_bad_arguments_and_data_are_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"checkpoint .* does not exist"):
        KVCalibration(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="save_every_batches=0"):
        KVCalibration(checkpoint, save_every_batches=0)

    def validate(folder: Path, batch: dict[str, torch.Tensor]) -> None:
        data: DataLoader[dict[str, torch.Tensor]] = DataLoader([batch], None)  # type: ignore[arg-type]
        trainer_for(folder).validate(KVCalibration(checkpoint), data, verbose=False)

    ids = torch.tensor([[5, 6, 128]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match=r"5\.\.128 were given"):
        validate(tmp_path / "a", batch)
    batch = {"input_ids": ids - 3, "attention_mask": torch.ones_like(ids), "scored_mask": torch.zeros_like(ids)}
    with pytest.raises(ValueError, match="No token was counted"):
        validate(tmp_path / "b", batch)


@pytest.mark.slow
def test_the_recipe_and_its_options_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--data.init_args.prompts.num_prompts=12", "--data.init_args.sampling.max_new_tokens=8"]
    options = ["method=percentile", "rounding=none", "per_head=true", "windowed_layers=bf16"]
    words = ["recipes/calibrate_kv.yaml", *small, *(f"--model.init_args.scales.{option}" for option in options)]
    assert forked(1, lambda _: main(["run", *words])) == [0]  # in its own process: a process group stays behind
    record = json.loads(Path("runs/calibrate_kv/run.json").read_text())["results"]
    scales = KVScales.load(Path("runs/calibrate_kv"))
    assert (scales.method, scales.rounding) == ("percentile", "none")
    assert record["layers"] == 6 and record["layers_in_bf16"] == 5 and record["tokens"] == scales.tokens  # one is full
    assert scales.layers[0] is None and present(scales.layers[1]).k.scale.shape == (2,)
    metrics = next(Path("runs/calibrate_kv").rglob("metrics.csv")).read_text()
    assert "kv/1/k_headroom" in metrics.splitlines()[0]
    small = ["--held_out.prompts_per_effort=2", "--sampling.max_new_tokens=4", "--engine.batch_size=2"]
    main(["run", "recipes/evaluate.yaml", "--kv_cache=fp8", "--kv_scales=runs/calibrate_kv", *small])
    parent = ["--checkpoint=lit_puzzle/assets/tiny_parent", "--run_dir=runs/other"]
    words = ["--kv_cache=fp8", "--kv_scales=runs/calibrate_kv", *parent, *small]
    with pytest.raises(SystemExit):
        main(["run", "recipes/evaluate.yaml", *words])
    assert f"The KV scales are of checkpoint {scales.fingerprint}" in capsys.readouterr().err


FILES = ("kv_scales.json", "kv_scales.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_read_layer_by_layer_has_the_same_scales(checkpoint, sequences, tmp_path, dtype):
    settings = ScaleSettings(method="mse", rounding="none", per_head=True)
    run(tmp_path / "resident", checkpoint, sequences, scales=settings, dtype=dtype)
    run(tmp_path / "streamed", checkpoint, sequences, scales=settings, dtype=dtype, memory_gib=ENOUGH_GIB)
    assert all(same_files(tmp_path / "resident" / name, tmp_path / "streamed" / name) for name in FILES)


def test_packed_documents_read_layer_by_layer_have_the_same_scales(tmp_path):
    parent = Path("lit_puzzle/assets/tiny_parent")
    documents = [Document([5 + i, 6, 7, 8, 9 + i], [0, 0, 1, 1, 1], "a", "low") for i in range(20)]
    write_documents(tmp_path / "documents", documents, parent)
    for name, gib in (("resident", None), ("streamed", ENOUGH_GIB)):
        data = PackedDocuments(tmp_path / "documents", parent, sequence_tokens=32, batch_size=2, validation_one_in=2)
        module = KVCalibration(parent, memory_gib=gib)
        trainer_for(tmp_path / name).validate(module, data, verbose=False)
        assert module.results["tokens"] > 30
    assert all(same_files(tmp_path / "resident" / name, tmp_path / "streamed" / name) for name in FILES)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_killed_inside_a_layer_calibration_goes_on_there(checkpoint, sequences, tmp_path, monkeypatch, layer):
    run(tmp_path / "whole", checkpoint, sequences)
    with monkeypatch.context() as patched:
        stop_at(patched, layer)
        with pytest.raises(Killed):
            run(tmp_path / "killed", checkpoint, sequences, memory_gib=ENOUGH_GIB)
    seen = layers_run(monkeypatch)
    run(tmp_path / "killed", checkpoint, sequences, memory_gib=ENOUGH_GIB)
    assert seen == list(range(layer, 4))
    assert all(same_files(tmp_path / "whole" / name, tmp_path / "killed" / name) for name in FILES)
    assert not list((tmp_path / "killed").glob("layers.*"))


def test_a_budget_below_one_layer_is_refused(checkpoint, sequences, tmp_path):
    with pytest.raises(ValueError, match=r"memory_gib=0\.01 was given; .* needs at least"):
        run(tmp_path / "run", checkpoint, sequences, memory_gib=0.01)
