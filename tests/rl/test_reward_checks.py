"""Rewards that are not one finite number for each completion stop the run by name, row and prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recovery_runs import Recorder, checkpoints, forked, make_child, make_data, make_module, make_trainer

from lit_puzzle.rl.reward_checks import CheckedAsyncReward, CheckedReward, Faults, checked_reward
from lit_puzzle.rl.settings import ExtraReward
from lit_puzzle.training.lightning import sound_checkpoint

ROWS = {"prompts": ["c", "a", "b"], "completion_ids": [[1], [2], [3]], "effort": ["low", "high", "low"]}
GIVEN = ROWS | {"environment": ["chains"] * 3, "completions": ["x"] * 3, "trainer_state": object()}


class JudgeError(Exception):
    """An exception that no library knows."""


def raises_on_two(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    if [2] in completion_ids:
        raise JudgeError("no\nconnection")
    return [1.0] * len(completion_ids)


WRONG: dict[str, tuple[Any, str]] = {
    "short": ([1.0], "returned list of length 1 on a batch of 3 completions"),
    "nothing": (None, "returned NoneType on a batch"),
    "a number": (1.0, "returned float on a batch"),
    "text": ("abc", "returned str of length 3 on a batch"),
    "None": ([1.0, None, 2.0], r"is None for completion 1 of 3, of training prompt 7 \(chains, effort high\)"),
    "NaN": ([1.0, 2.0, float("nan")], r"is nan for completion 2 of 3, of training prompt 8 \(chains, effort low\)"),
    "inf": ([float("-inf"), 2.0, 3.0], "is -inf for completion 0 of 3, of training prompt None"),
    "beyond float32": ([1e39, 2.0, 3.0], r"is 1e\+39 for completion 0"),
    "words": (["1.0", "2.0", "3.0"], "is 1.0 for completion 0"),
    "tensor": (torch.tensor([0.0, float("nan"), 0.0]), "is nan for completion 1"),
}


def faults() -> Faults:
    return Faults(["p"] * 7 + ["a", "b"])


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_recorded_and_zeros_stand_for_them(name: str) -> None:
    returned, message = WRONG[name]
    found = faults()
    assert CheckedReward(lambda **_: returned, "mine", found)(**GIVEN) == [0.0] * 3
    with pytest.raises(ValueError, match=f"The reward 'mine' {message}"):
        raise ValueError(found.found[0])


@pytest.mark.parametrize(
    "right", [[1, True, 0.5], (1, True, 0.5), torch.tensor([1, 1, 0.5]), list(torch.tensor([1, 1, 0.5]))]
)
def test_numbers_of_any_kind_pass(right: Any) -> None:
    found = faults()
    assert CheckedReward(lambda **_: right, "mine", found)(**GIVEN) == [1.0, 1.0, 0.5]
    assert found.found == []


def test_the_first_row_that_raises_is_named() -> None:
    found = faults()
    assert CheckedReward(raises_on_two, "judge", found)(**GIVEN) == [0.0] * 3
    said = "The reward 'judge' raised JudgeError: no connection for completion 1 of 3, of training prompt 7 (chains,"
    assert found.found[0].startswith(said)


async def waits(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    if [2] in completion_ids:
        raise JudgeError("late")
    return [0.5] * len(completion_ids)


def test_async_functions_are_checked_too() -> None:
    import asyncio

    found = faults()
    function: Any = waits
    checked: Any = checked_reward(function, "waits", found)
    assert isinstance(checked, CheckedAsyncReward)
    assert asyncio.run(checked(**GIVEN)) == [0.0] * 3
    assert "raised JudgeError: late on a batch of 3" in found.found[0]
    assert asyncio.run(checked(**GIVEN | {"completion_ids": [[1], [3]]})) == [0.5] * 2 and len(found.found) == 1


class Breaks:
    """Right in the first rollout, which lasts 4 updates; wrong in the second on the first process."""

    def __init__(self, rank: int) -> None:
        self.calls, self.rank, self.__name__ = 0, rank, "breaks"

    def __call__(self, *, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.calls += 1
        bad = float("nan") if self.calls == 2 and self.rank == 0 else 1.0
        return [float(sum(ids) % 5) for ids in completion_ids[:-1]] + [bad]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_a_run_stops_on_all_processes_and_its_checkpoints_stay(
    tiny_config: Any, tmp_path: Path, processes: int
) -> None:
    """Two processes: the one whose rewards are right stops with the same message instead of waiting for the other."""
    child = make_child(tmp_path / "child", tiny_config(num_hidden_layers=2), experts=(4, 2))

    def run(rank: int) -> None:
        trainer = make_trainer(tmp_path / "run", processes, 8, [Recorder(tmp_path, rank=rank), *checkpoints()])
        module = make_module(child, extra_rewards=[ExtraReward(Breaks(rank))])
        try:
            trainer.fit(module, datamodule=make_data(prompts=16))
        except ValueError as error:
            (tmp_path / f"said{rank}").write_text(str(error))

    assert forked(processes, run) == [0] * processes
    for rank in range(processes):
        said = (tmp_path / f"said{rank}").read_text()
        assert said.startswith("The reward 'breaks' is nan for completion 15 of 16, of training prompt ")
    newest = sound_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name == "step=4.ckpt"
