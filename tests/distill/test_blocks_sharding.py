"""Blockwise distillation on two processes: layers and blocks in halves, and the numbers of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.block_runs import Inputs, fit, make_inputs
from helpers.recovery_runs import forked
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_puzzle.distill.block_losses import TrainableBlock
from lit_puzzle.distill.settings import BlockTrainingSettings
from lit_puzzle.training.sharding import full


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("bld"), tiny_config)


class WatchShards(Callback):
    """Keeps the first gradients and the last weights; sharded, no module is a root and nothing stays gathered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            gradients = {name: full(p.grad).clone() for name, p in pl_module.blocks.named_parameters()}
            torch.save(gradients, self.folder / f"gradients{trainer.global_rank}.pt")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        sharded = [module for module in pl_module.modules() if isinstance(module, FSDPModule)]
        groups = [*pl_module.parent.model.layers, *pl_module.blocks]
        assert set(sharded) == set(groups if trainer.world_size > 1 else [])
        for name, parameter in (pair for group in groups for pair in group.named_parameters()):
            assert isinstance(parameter, DTensor) == (trainer.world_size > 1), name
            assert parameter.requires_grad == any(parameter is p for p in pl_module.blocks.parameters())
        assert set(trainer.optimizers[0].state) == set(pl_module.blocks.parameters())
        assert all(type(state["exp_avg"]) is type(p.data) for p, state in trainer.optimizers[0].state.items())
        weights = {name: full(p).detach().clone() for name, p in pl_module.blocks.named_parameters()}
        torch.save(weights, self.folder / f"weights{trainer.global_rank}.pt")


VARIANTS: dict[str, dict[str, Any]] = {
    "apart": {},
    "together": {
        "training": BlockTrainingSettings(sub_blocks="together", tensors=["mlp.*", "self_attn.*"]),
        "clip_norm": None,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_two_processes_equal_one(inputs: Inputs, tmp_path: Path, variant: str) -> None:
    def work(rank: int, folder: Path, processes: int) -> None:
        data = {"batch_size": 4 // processes}
        fit(folder, inputs, 4, processes, rank, callbacks=[WatchShards(folder)], data=data, **VARIANTS[variant])

    one, two = tmp_path / "one", tmp_path / "two"
    assert forked(1, lambda rank: work(rank, one, 1)) == [0]
    assert forked(2, lambda rank: work(rank, two, 2)) == [0, 0]
    for kind in ("gradients", "weights"):
        reference = torch.load(one / f"{kind}0.pt")
        for rank in (0, 1):
            found = torch.load(two / f"{kind}{rank}.pt")
            assert found.keys() == reference.keys()
            for name, tensor in reference.items():
                largest = float(tensor.abs().max())
                assert largest > 0 or name.endswith("k_proj/bias"), name  # a shift of all keys changes no softmax
                message = f"{kind} {name} on {rank}"
                torch.testing.assert_close(found[name], tensor, atol=1e-5 * largest + 1e-9, rtol=1e-5, msg=message)
    single, both = (torch.load(folder / "results.pt") for folder in (one, two))
    assert both == pytest.approx(single, rel=1e-5)
    for path in (one / "library").glob("*.safetensors"):
        other = load_file(two / "library" / path.name)
        for name, tensor in load_file(path).items():  # rounded to bfloat16
            torch.testing.assert_close(other[name], tensor, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
def test_bfloat16_beside_float32_masters(inputs: Inputs, tmp_path: Path) -> None:
    """The frozen parent in bfloat16 and what trains in float32, whole and sharded, near the run in float32."""

    def work(rank: int, folder: Path, processes: int, **settings: Any) -> None:
        watch, data = WatchShards(folder), {"batch_size": 4 // processes}
        fit(folder, inputs, 4, processes, rank, callbacks=[watch], data=data, **settings)
        weights = torch.load(folder / f"weights{rank}.pt")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    mixed: dict[str, Any] = {"training": BlockTrainingSettings(dtype="bfloat16"), "precision": "bf16-mixed"}
    folders = [tmp_path / name for name in ("exact", "one", "two")]
    assert forked(1, lambda rank: work(rank, folders[0], 1)) == [0]
    assert forked(1, lambda rank: work(rank, folders[1], 1, **mixed)) == [0]
    assert forked(2, lambda rank: work(rank, folders[2], 2, **mixed)) == [0, 0]
    exact, *others = (torch.load(folder / "results.pt") for folder in folders)
    for found in others:
        assert found == pytest.approx(exact, rel=0.05) and found != exact


def test_only_trained_tensors_are_parameters_of_blocks(inputs: Inputs) -> None:
    def work(rank: int) -> None:
        made = fit(inputs.library.parent / "run", inputs, 1)
        blocks = [block for block in made.blocks if isinstance(block, TrainableBlock)]
        assert len(blocks) == 5 and all(p.dtype == torch.float32 for p in made.blocks.parameters())
        assert [sum(p.numel() for p in b.parameters()) for b in blocks[:2]] == [4 * 33, 2 * 33]
        assert made.parent is not None and not any(p.requires_grad for p in made.parent.parameters())

    assert forked(1, work) == [0]
