"""Global distillation through `Trainer.fit`: what trains, what is saved and written, averages, bad input."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distillation_runs import Models, fit, make_data, make_models, make_module, results, weights
from helpers.recovery_runs import forked, losses, make_trainer, validations
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lit_puzzle.data.packing_settings import DocumentFilter
from lit_puzzle.data.rl_prompts import PromptData
from lit_puzzle.distill.settings import DistillationEvaluation, LossSettings, ValidationProblems
from lit_puzzle.distill.top_logits import precompute_logits
from lit_puzzle.evaluate.accuracy import read_episodes
from lit_puzzle.generation.sampling import EngineSettings
from lit_puzzle.tiny.world import Chains, Counting
from lit_puzzle.training.settings import LoraSettings, TrainingSettings

EVALUATION = DistillationEvaluation(
    [Chains(), Counting()], ["low", "high"], 4, max_new_tokens=4, batch_size=8, validation=ValidationProblems(2)
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Models:
    return make_models(tmp_path_factory.mktemp("kd"), tiny_config)


def run(work: Any, processes: int = 1) -> None:
    assert forked(processes, work) == [0] * processes


# ---- what a run does ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_measures_the_folders_as_the_model_in_memory_does(models: Models, tmp_path: Path) -> None:
    found = {}
    for name, engine in (("memory", None), ("apart", EngineSettings("transformers"))):
        evaluation = replace(EVALUATION, validation=ValidationProblems(), engine=engine)
        run(lambda rank: fit(tmp_path / name, models, 2, evaluation=evaluation))  # noqa: B023
        found[name] = [read_episodes(tmp_path / name / when) for when in ("before", "after")]
    assert found["apart"] == found["memory"] and len(found["memory"][0]) == 8


class WatchOptimizer(Callback):
    """Only what trains has optimizer state; experts and router do not train."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trained = {name for name, p in pl_module.named_parameters() if p in trainer.optimizers[0].state}
        assert trained == {name for name, p in pl_module.named_parameters() if p.requires_grad}
        assert trained and not any(name.startswith("parent") or ".mlp." in name for name in trained)


def test_a_run_learns_evaluates_and_writes_the_best_child(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    adam = partial(torch.optim.AdamW, lr=1e-2)
    run(lambda rank: fit(folder, models, 12, evaluation=EVALUATION, optimizer=adam, callbacks=[WatchOptimizer()]))
    found = results(folder)
    assert found["val_loss/best"] < 0.9 * found["val_loss/first"]
    assert {f"accuracy/{e}/{w}" for e in ("low", "high") for w in ("before", "after", "gain", "gain_se")} < found.keys()
    validated = {step: float.fromhex(loss) for step, loss in validations(folder)}
    assert list(validated) == [3, 6, 9, 12] and found["val_loss/best"] == pytest.approx(min(validated.values()))
    before, after = (load_file(path / "model.safetensors") for path in (models.child, folder / "child"))
    best = torch.load(next((folder / "best").glob("*.ckpt")) / "meta.pt", weights_only=False)
    assert best["global_step"] == min(validated, key=lambda step: validated[step])
    for name, tensor in before.items():
        frozen = ".mlp.experts." in name or ".mlp.router." in name
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) == frozen, name


class WatchAverage(Callback):
    """Validation uses the averages and training the weights; the first average is of the first update."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights, self.averages = self._both(pl_module)
        assert not all(map(torch.equal, self.weights, self.averages))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert all(map(torch.equal, self._both(pl_module)[0], self.averages))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        assert all(map(torch.equal, self._both(pl_module)[0], self.weights))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = self._both(pl_module)[1]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        decay = min(0.9, (1 + trainer.global_step) / (10 + trainer.global_step))
        weights, averages = self._both(pl_module)
        for old, new, average in zip(self.before, weights, averages, strict=True):
            torch.testing.assert_close(average, decay * old + (1 - decay) * new)

    @staticmethod
    def _both(pl_module: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        trained = [p.detach().clone() for p in pl_module.child.parameters() if p.requires_grad]
        return trained, [average.clone() for average in pl_module.average.buffers()]


def test_the_average_is_validated_and_saved(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(lambda rank: fit(folder, models, 6, ema_decay=0.9, callbacks=[WatchAverage()]))
    state, child = weights(folder), load_file(folder / "child" / "model.safetensors")
    trained = [name for name in state if name.startswith("child.")]
    assert len(trained) * 2 == len(state)
    for index, name in enumerate(trained):
        average = state[f"average.average_{index}"]
        assert not torch.equal(average, state[name])
        assert torch.equal(child[name.removeprefix("child.")], average.to(torch.bfloat16)), name


def test_a_diverging_run_ends_with_its_best_weights(models: Models, tmp_path: Path) -> None:
    folder, wild = tmp_path / "run", partial(torch.optim.SGD, lr=100.0)
    run(lambda rank: fit(folder, models, 9, optimizer=wild, lr_scheduler=None))
    validated = {step: float.fromhex(loss) for step, loss in validations(folder)}
    assert validated[9] > 1.5 * min(validated.values())
    dcp_to_torch_save(next((folder / "best").glob("*.ckpt")), tmp_path / "best.pt")
    best = torch.load(tmp_path / "best.pt", weights_only=True)["state_dict"]
    child = load_file(folder / "child" / "model.safetensors")
    assert best
    for name, tensor in best.items():
        assert torch.equal(child[name.removeprefix("child.")], tensor.to(torch.bfloat16)), name


def test_adapters_train_alone_and_are_merged(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(lambda rank: fit(folder, models, 4, training=TrainingSettings(lora=LoraSettings(rank=2))))
    assert all(".lora_" in name for name in weights(folder))
    before, after = (load_file(path / "model.safetensors") for path in (models.child, folder / "child"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(
        name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")) for name in moved
    )


def test_top_k_logits_on_disk_replace_the_parent(models: Models, tmp_path: Path) -> None:
    """With 127 of 128 tokens, as float32: the same losses as with the parent itself."""
    (tmp_path / "top").mkdir()
    precompute_logits(tmp_path / "top", models.parent, models.documents, top_k=127, precision="float32")
    top, loss = tmp_path / "top" / "top_logits", LossSettings(lm=0.1)
    run(lambda rank: fit(tmp_path / "disk", models, 3, parent=top, loss=loss))
    run(lambda rank: fit(tmp_path / "live", models, 3, loss=loss))
    disk, live = ({k: float.fromhex(v) for k, v in losses(tmp_path / name).items()} for name in ("disk", "live"))
    assert disk == pytest.approx(live, rel=1e-4)


def test_one_step_of_two_batches_is_two_steps_accumulated(models: Models, tmp_path: Path) -> None:
    adam = partial(torch.optim.AdamW, lr=3e-3, eps=1e-3)
    plain: dict[str, Any] = {"optimizer": adam, "lr_scheduler": None}
    run(lambda rank: fit(tmp_path / "1x2", models, 2, data={"batch_size": 2}, **plain))
    accumulate = {"accumulate_grad_batches": 2, "val_check_interval": 4}
    run(lambda rank: fit(tmp_path / "2x1", models, 2, data={"batch_size": 1}, trainer=accumulate, **plain))
    together, apart = weights(tmp_path / "1x2"), weights(tmp_path / "2x1")
    for name, tensor in together.items():
        torch.testing.assert_close(apart[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_early_stop(models: Models, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        stop = EarlyStopping("val/loss", patience=1, min_delta=100.0)
        fit(tmp_path / "run", models, 100, callbacks=[stop])

    run(work)
    assert len(losses(tmp_path / "run")) == 6  # the second validation is no better by 100
    assert (tmp_path / "run" / "child" / "model.safetensors").is_file()


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_batch(models: Models, tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                with torch.no_grad():
                    pl_module.model.lm_head.weight[5, 0] = torch.nan

    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"loss is nan at step 2.*broken_batch_0\.pt"):
            fit(tmp_path / "run", models, 9, callbacks=[Break()])

    run(work)
    saved = torch.load(tmp_path / "run" / "broken_batch_0.pt", weights_only=True)
    assert saved["step"] == 2 and saved["batch"]["input_ids"].shape == (2, 32)
    assert not (tmp_path / "run" / "child").exists()


@pytest.fixture
def top_logits(models: Models, tmp_path: Path) -> Path:
    """The parent's top-k logits."""
    (tmp_path / "top").mkdir()
    precompute_logits(tmp_path / "top", models.parent, models.documents, top_k=8)
    return tmp_path / "top" / "top_logits"


def test_impossible_settings_are_refused(models: Models, top_logits: Path) -> None:
    with pytest.raises(ValueError, match=r"top-k logits .* holds no config\.json or top_logits\.json"):
        make_module(models, parent=models.documents)
    with pytest.raises(ValueError, match="ema_decay=1"):
        make_module(models, ema_decay=1.0)
    with pytest.raises(ValueError, match="contain no hidden states"):
        make_module(models, parent=top_logits, loss=LossSettings(hidden=1.0))


def test_top_k_logits_need_documents_on_disk(models: Models, top_logits: Path, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        module = make_module(models, parent=top_logits, loss=LossSettings())
        trainer = make_trainer(tmp_path, 1, 1, [], enable_checkpointing=False)
        with pytest.raises(ValueError, match="data must be PackedDocuments, not PromptData"):
            trainer.fit(module, datamodule=PromptData([Chains()], {"low": 1.0}))

    run(work)  # a fit opens a process group


def test_sequences_longer_than_the_parents_context(models: Models, tmp_path: Path) -> None:
    """Documents of a model with a longer context are refused, by the data and by the module."""
    with pytest.raises(ValueError, match="64"):
        make_data(models, sequence_tokens=65)
    module = make_module(models)
    module.trainer = make_trainer(tmp_path, 1, 1, [], enable_checkpointing=False)
    module.configure_model()
    batch = {name: torch.zeros(1, 80, dtype=torch.long) for name in ("input_ids", "document_ids", "loss_mask")}
    with pytest.raises(ValueError, match=r"80 tokens.*context holds 64.*sequence_tokens"):
        module.training_step(batch | {"position_ids": torch.arange(80)[None]}, 0)
    with pytest.raises(ValueError, match=r"Token 128.*0\.\.127"):
        module.training_step({name: torch.full((1, 8), 128) for name in [*batch, "position_ids"]}, 0)


def test_an_adapter_on_the_head_is_refused(models: Models) -> None:
    for lora in (
        LoraSettings(target_modules=["q_proj", "lm_head"]),
        LoraSettings(target_parameters=["lm_head.weight"]),
    ):
        with pytest.raises(ValueError, match=r"distillation trains no adapter on the head \('lm_head"):
            make_module(models, training=TrainingSettings(lora=lora))


def test_validation_has_the_efforts_of_the_documents_unless_told(models: Models, tmp_path: Path) -> None:
    """Their documents are of high effort only."""

    def validated(name: str, data: dict[str, Any] | None = None, efforts: list[str] | None = None) -> set[str]:
        evaluation = DistillationEvaluation(
            [Chains()],
            ["low", "high"],
            prompts_per_effort=2,
            max_new_tokens=2,
            validation=ValidationProblems(3, efforts),
        )
        module = make_module(models, evaluation=evaluation)
        module.trainer = make_trainer(tmp_path / name, 1, 1, [])
        module.trainer.datamodule = make_data(models, **(data or {}))  # type: ignore[attr-defined]
        module.setup("fit")
        assert module.held_out is not None
        assert {effort for _, effort in module.held_out.problems} == {"low", "high"}
        return {effort for _, effort in module.held_out.validation_problems}

    assert validated("default") == {"high"}
    assert validated("told", efforts=["low", "medium"]) == {"low", "medium"}
    assert validated("none left", data={"filter": DocumentFilter(efforts=["low"])}) == {"low", "high"}
    with pytest.raises(ValueError, match="immense"):
        validated("wrong", efforts=["immense"])
