"""Blockwise distillation of a parent read one layer at a time: the bytes of the resident run, killed or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.block_runs import Inputs, fit, fit_streamed, library_bytes, make_inputs
from helpers.distillation_runs import random_documents
from helpers.recovery_runs import forked, kill_self
from helpers.streamed_runs import ENOUGH_GIB
from lightning.pytorch import Callback

from lit_puzzle.data.document_files import write_documents
from lit_puzzle.distill import blocks_streamed
from lit_puzzle.distill.settings import BlockTrainingSettings

STEPS = 9
SINGLE = {"batch_size": 1, "sequence_tokens": 32, "validation_one_in": 3}
CASES: dict[str, dict[str, Any]] = {
    "apart": {"completions_only": True},
    "together": {"training": BlockTrainingSettings(sub_blocks="together", tensors=["self_attn.*", "mlp.router.*"])},
    "experts train": {"training": BlockTrainingSettings(tensors=["mlp.*"])},
    "last layer": {"training": BlockTrainingSettings(layers=[1])},
    "autocast": {"training": BlockTrainingSettings(dtype="bfloat16"), "precision": "bf16-mixed"},
    "stream in float32": {"precision": "bf16-mixed"},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("bld"), tiny_config)


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    folder = tmp_path_factory.mktemp("resident") / "run"
    assert forked(1, lambda rank: fit(folder, inputs, STEPS)) == [0]
    return folder


def with_few_documents(inputs: Inputs, folder: Path) -> Inputs:
    write_documents(folder / "few", random_documents(20), inputs.parent)
    return inputs._replace(documents=folder / "few")


def same(streamed: Path, resident: Path) -> None:
    assert library_bytes(streamed) == library_bytes(resident)
    assert torch.load(streamed / "results.pt") == torch.load(resident / "results.pt")


@pytest.mark.parametrize("case", CASES)
def test_a_streamed_run_gives_the_bytes_of_the_resident_one(inputs: Inputs, tmp_path: Path, case: str) -> None:
    settings = dict(CASES[case])
    precision = settings.pop("precision", "32-true")

    def both(rank: int) -> None:
        fit(tmp_path / "resident", inputs, STEPS, precision=precision, **settings)
        fit_streamed(tmp_path / "streamed", inputs, STEPS, trainer={"precision": precision}, **settings)

    assert forked(1, both) == [0]
    same(tmp_path / "streamed", tmp_path / "resident")
    left = sorted(path.name for path in (tmp_path / "streamed" / "layers.0").iterdir())
    layers = [1] if case == "last layer" else [0, 1]
    assert left == ["record.json", *(f"trained.{layer}" for layer in layers)]


def killed_at_update(number: int) -> dict[str, Any]:
    """Settings of a run that ends by SIGKILL at an update, counted over all layers."""
    seen: list[int] = []

    def on_step(step: int) -> None:
        seen.append(step)
        if len(seen) == number:
            kill_self()

    return {"on_step": on_step}


def killed_at_call(owner: Any, name: str, number: int) -> dict[str, Any]:
    """End this process by SIGKILL when a function has been called for the nth time, right before it returns."""
    function: Callable[..., Any] = getattr(owner, name)
    seen: list[str] = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        seen.append(name)
        if len(seen) == number:
            kill_self()
        return result

    setattr(owner, name, counted)
    return {}


KILLS: dict[str, Callable[[], dict[str, Any]]] = {
    "in the first layer's fit": lambda: killed_at_update(5),
    "in the second layer's fit": lambda: killed_at_update(STEPS + 5),
    "in the second layer's pass": lambda: killed_at_call(blocks_streamed, "parent_states", 8),
    "with the first layer trained": lambda: killed_at_call(blocks_streamed.StreamedBlocks, "_is_done", 5),
    "with the library written": lambda: killed_at_call(blocks_streamed.StreamedBlocks, "losses", 1),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_ends_with_the_same_bytes(inputs: Inputs, resident: Path, tmp_path: Path, kill: str) -> None:
    folder = tmp_path / "killed"
    assert forked(1, lambda rank: fit_streamed(folder, inputs, STEPS, **KILLS[kill]())) == [-9]
    assert not (folder / "library").exists() and any((folder / "layers.0").iterdir())
    assert forked(1, lambda rank: fit_streamed(folder, inputs, STEPS)) == [0]
    same(folder, resident)


@pytest.mark.parametrize(
    "damage", [lambda whole: b"damaged", lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])], ids=["all", "one bit"]
)
def test_a_damaged_file_of_a_trained_layer_is_trained_again(
    inputs: Inputs, resident: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    folder, kill = tmp_path / "killed", KILLS["with the library written"]
    assert forked(1, lambda rank: fit_streamed(folder, inputs, STEPS, **kill())) == [-9]
    kept = folder / "layers.0" / "trained.1"
    kept.write_bytes(damage(kept.read_bytes()))
    before = (folder / "layers.0" / "trained.0").stat().st_mtime_ns
    assert forked(1, lambda rank: fit_streamed(folder, inputs, STEPS)) == [0]
    assert (folder / "layers.0" / "trained.0").stat().st_mtime_ns == before
    same(folder, resident)


def test_batches_that_come_again_are_kept_once(inputs: Inputs, tmp_path: Path) -> None:
    """With one sequence in a batch the epochs repeat their batches in other orders; the states are those of one."""
    few = with_few_documents(inputs, tmp_path)

    def both(rank: int) -> None:
        fit(tmp_path / "resident", few, STEPS, data=SINGLE)
        fit_streamed(tmp_path / "streamed", few, STEPS, data=SINGLE)

    assert forked(1, both) == [0]
    same(tmp_path / "streamed", tmp_path / "resident")
    packed = json.loads((tmp_path / "streamed" / "packed" / "packed.json").read_text())["statistics"]
    sequences = packed["train/sequences"] + packed["validation/sequences"]
    assert packed["train/sequences"] < STEPS
    assert json.loads((tmp_path / "streamed" / "layers.0" / "record.json").read_text())["tokens"] == 32 * sequences


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1])
def test_another_number_of_updates_is_refused_once_a_layer_is_done(inputs: Inputs, tmp_path: Path, steps: int) -> None:
    folder, kill = tmp_path / "run", KILLS["in the second layer's fit"]
    assert forked(1, lambda rank: fit_streamed(folder, inputs, STEPS, **kill())) == [-9]
    kept = (folder / "layers.0" / "trained.0").read_bytes()

    def refused(rank: int) -> None:
        words = rf"max_steps={steps} was given; the blocks of layer 0 .* for {STEPS} updates .*max_steps={STEPS}, or"
        with pytest.raises(ValueError, match=words) as error:
            fit_streamed(folder, inputs, steps)
        assert "\n" not in str(error.value)

    assert forked(1, refused) == [0]
    assert (folder / "layers.0" / "trained.0").read_bytes() == kept


def test_impossible_runs_are_refused_before_anything_is_read(inputs: Inputs, tmp_path: Path) -> None:
    def refused(message: str, steps: int = STEPS, gib: float = ENOUGH_GIB, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            fit_streamed(tmp_path / "run", inputs, steps, gib, **settings)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run" / "layers.0").exists()

    refused(r"memory_gib=0 was given; it is above 0", gib=0)
    refused(r"memory_gib=0\.01 was given; .* needs at least \d+\.\d\d GiB", gib=0.01)
    refused(r"one process; the trainer has 2\. Set trainer\.devices: 1", devices=2)
    refused(r"trainer\.max_steps updates, which is not set", steps=-1)


def test_a_batch_that_was_not_there_at_the_start_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    def other_batch(rank: int) -> None:
        made = blocks_streamed.each_once
        blocks_streamed.each_once = lambda batches: made(iter(list(batches)[1:]))  # the first one is lacking
        with pytest.raises(ValueError, match="gave a batch that it did not give when the run started"):
            fit_streamed(tmp_path / "run", inputs, 2)

    assert forked(1, other_batch) == [0]


class StopsAtFour(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 4


def test_a_layer_that_stops_early_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    def stops(rank: int) -> None:
        with pytest.raises(ValueError, match="layer 0 stopped after 4 of 9 updates"):
            fit_streamed(tmp_path / "run", inputs, STEPS, callbacks=[StopsAtFour()])

    assert forked(1, stops) == [0]
