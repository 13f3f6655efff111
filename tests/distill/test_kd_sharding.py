"""Global distillation on two processes: everything in halves, and the numbers of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distillation_runs import Models, fit, make_models, results
from helpers.recovery_runs import forked, validations
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from lit_puzzle.distill.settings import DistillationEvaluation, LossSettings, ValidationProblems
from lit_puzzle.tiny.world import Chains, Counting
from lit_puzzle.training.settings import LoraSettings, TrainingSettings
from lit_puzzle.training.sharding import full

EVALUATION = DistillationEvaluation(
    [Chains(), Counting()], ["low", "high"], 4, max_new_tokens=4, batch_size=8, validation=ValidationProblems(2)
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Models:
    return make_models(tmp_path_factory.mktemp("kd"), tiny_config)


class WatchShards(Callback):
    """Keeps the first gradients; sharded, every parameter of both models is half here, optimizer state too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step > 0:
            return
        gradients = {name: full(p.grad).clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        torch.save(gradients, self.folder / f"gradients{trainer.global_rank}.pt")
        for name, parameter in pl_module.named_parameters():
            halved = isinstance(parameter, DTensor) and parameter.to_local().numel() * 2 == parameter.numel()
            assert halved == (trainer.world_size > 1), name

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        state = trainer.optimizers[0].state
        assert set(state) == {p for p in pl_module.parameters() if p.requires_grad}
        assert all(type(state[p]["exp_avg"]) is type(p.data) for p in state)


VARIANTS: dict[str, dict[str, Any]] = {
    "weights": {"evaluation": EVALUATION, "ema_decay": 0.8},
    "adapters": {"training": TrainingSettings(lora=LoraSettings(rank=2))},
    "adapters everywhere": {
        "training": TrainingSettings(
            lora=LoraSettings(
                rank=2,
                target_modules=["q_proj", "embed_tokens"],
                target_parameters=["experts.down_proj", "experts.gate_up_proj", "router.weight"],
            )
        )
    },
    "checkpointing": {
        "training": TrainingSettings(gradient_checkpointing=True),
        "loss": LossSettings("jsd", temperature=2.0, hidden=0.5),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_two_processes_equal_one(models: Models, tmp_path: Path, variant: str) -> None:
    def work(rank: int, folder: Path, processes: int) -> None:
        torch.manual_seed(0)  # of adapters
        watch, data = WatchShards(folder), {"batch_size": 4 // processes}
        fit(folder, models, 3, processes, rank, callbacks=[watch], data=data, **VARIANTS[variant])

    one, two = tmp_path / "one", tmp_path / "two"
    assert forked(1, lambda rank: work(rank, one, 1)) == [0]
    assert forked(2, lambda rank: work(rank, two, 2)) == [0, 0]
    for kind in ("gradients", "weights"):
        reference = torch.load(one / f"{kind}0.pt", weights_only=True)
        for rank in (0, 1):
            sharded = torch.load(two / f"{kind}{rank}.pt", weights_only=True)
            assert sharded.keys() == reference.keys()
            for name, tensor in reference.items():
                largest = float(tensor.abs().max())
                # One factor of an adapter starts at 0 (B of layers, A of embeddings): the other has no gradient yet.
                assert largest > 0 or "lora_A" in name or "lora_embedding_B" in name, name
                torch.testing.assert_close(
                    sharded[name], tensor, atol=1e-5 * largest, rtol=1e-5, msg=f"{kind} {name} on {rank}"
                )
    single, both = ({k: float.fromhex(v) for k, v in validations(folder)} for folder in (one, two))
    assert both == pytest.approx(single, rel=1e-5)
    different = {"loss/first", "loss/last"}  # of the first process
    assert {k: v for k, v in results(two).items() if k not in different} == pytest.approx(
        {k: v for k, v in results(one).items() if k not in different}, rel=1e-5, abs=1e-6
    )


@pytest.mark.slow
def test_two_processes_train_float32_beside_frozen_bfloat16(models: Models, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        mixed: dict[str, Any] = {"training": TrainingSettings(dtype="bfloat16"), "trainer": {"precision": "bf16-mixed"}}
        fit(tmp_path, models, 3, 2, rank, callbacks=[Dtypes()], **mixed)

    assert forked(2, work) == [0, 0]
    before, after = (load_file(folder / "model.safetensors") for folder in (models.child, tmp_path / "child"))
    for name, tensor in before.items():
        frozen = ".experts." in name or ".router." in name
        assert torch.equal(tensor, after[name]) == frozen and bool(after[name].isfinite().all()), name


class Dtypes(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
