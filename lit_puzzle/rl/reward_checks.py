"""Checks of what reward functions return: one finite number for each completion, or the run stops with a clear reason.

TRL takes None for "does not apply", and NaN and infinities as they come, which spreads them over the advantages of a
group. A checked function records what is wrong and returns zeros; the engine asks for the record when all processes
have exchanged their rewards, so that all of them stop and none waits for another. A function that raises is called
again for one completion after the other, to name the first one. Reads and writes nothing.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lit_puzzle.rl.settings import RewardFunction

LARGEST = torch.finfo(torch.float32).max  # TRL computes rewards in float32


@dataclass
class Faults:
    """What was wrong with the rewards of this process.

    Attributes:
        prompts: texts of the training prompts, in order; they tell the place of a prompt.
        found: one sentence for each fault.
    """

    prompts: Sequence[str]
    found: list[str] = field(default_factory=list)

    def add(self, name: str, what: str, row: int | None, given: dict[str, Any]) -> None:
        """Record a fault of the reward `name`: of one completion of the batch, or of the batch as a whole."""
        count = len(given["completion_ids"])
        where = f"on a batch of {count} completions"
        if row is not None:
            text = given["prompts"][row]
            place = next((i for i, prompt in enumerate(self.prompts) if prompt == text), None)
            effort, environment = given["effort"][row], given["environment"][row]
            where = f"for completion {row} of {count}, of training prompt {place} ({environment}, effort {effort})"
        self.found.append(f"The reward {name!r} {what} {where}. A reward is one finite number for each completion.")


class _Caught:
    """Keeps the exception of the user's code, which may be of any class, or its exit, instead of raising it."""

    error: Exception | SystemExit | None = None

    def __enter__(self) -> "_Caught":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error if isinstance(error, Exception | SystemExit) else None
        return self.error is not None


class CheckedReward:
    """A reward function whose values are checked; zeros stand for what is wrong.

    Args:
        function: reward function in TRL's form.
        name: under which it is logged.
        faults: gets what is wrong.
    """

    def __init__(self, function: RewardFunction, name: str, faults: Faults) -> None:
        self.function, self.faults = function, faults
        self.__name__ = name

    def __call__(self, **given: Any) -> list[float]:
        """Return the function's values, one for each completion."""
        caught = _Caught()
        returned: Any = None
        with caught:
            returned = self.function(**given)
        if caught.error is None:
            return self.checked(returned, given)
        rows = range(len(given["completion_ids"]))
        failing = next((row for row in rows if self._raises(_only(given, row))), None)
        return self.failed(caught.error, failing, given)

    def _raises(self, given: dict[str, Any]) -> bool:
        caught = _Caught()
        with caught:
            self.function(**given)
        return caught.error is not None

    def failed(self, error: Exception | SystemExit, row: int | None, given: dict[str, Any]) -> list[float]:
        """Record an exception and return zeros."""
        said = " ".join(str(error).split())
        self.faults.add(self.__name__, f"raised {type(error).__name__}: {said[:300]}", row, given)
        return [0.0] * len(given["completion_ids"])

    def checked(self, returned: Any, given: dict[str, Any]) -> list[float]:
        """Return the values as floats; record the first that is not a finite number, or another number of values."""
        count = len(given["completion_ids"])
        values = returned.tolist() if isinstance(returned, Tensor) else returned
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            length = f" of length {len(values)}" if isinstance(values, Sequence) else ""
            self.faults.add(self.__name__, f"returned {type(returned).__name__}{length}", None, given)
            return [0.0] * count
        numbers = [value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in values]
        wrong = next((row for row, number in enumerate(numbers) if not _is_finite(number)), None)
        if wrong is not None:
            self.faults.add(self.__name__, f"is {str(numbers[wrong])[:100]}", wrong, given)
            return [0.0] * count
        return [float(number) for number in numbers]


class CheckedAsyncReward(CheckedReward):
    """The same of an `async` function, which TRL runs beside others."""

    async def __call__(self, **given: Any) -> list[float]:  # type: ignore[override]
        """Return the function's values, one for each completion."""
        caught = _Caught()
        returned: Any = None
        with caught:
            returned = await self.function(**given)  # type: ignore[misc]
        return self.checked(returned, given) if caught.error is None else self.failed(caught.error, None, given)


def checked_reward(function: RewardFunction, name: str, faults: Faults) -> CheckedReward:
    """Return a function with its values checked."""
    return (CheckedAsyncReward if _is_async(function) else CheckedReward)(function, name, faults)


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _only(given: dict[str, Any], row: int) -> dict[str, Any]:
    """Return the arguments of one completion."""
    count = len(given["completion_ids"])
    return {
        key: [value[row]] if isinstance(value, list) and len(value) == count else value for key, value in given.items()
    }


def _is_finite(number: object) -> bool:
    return isinstance(number, Real) and abs(float(number)) <= LARGEST  # false for NaN
