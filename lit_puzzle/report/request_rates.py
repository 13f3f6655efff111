"""What a child is worth per request: request rates, retention of accuracy, lengths, speed-up at equal accuracy.

With X the best token throughput of a model and T the mean generated tokens of a request at an effort,

    request rate            R = X / T
    relative request rate   r = R / R of the parent at a named effort
    retention               accuracy of the child / accuracy of the parent at the same effort
    effort length ratio     T at high effort / T at low effort
    speed-up at equal accuracy   cost at which the parent's frontier has the accuracy of the child's setting, divided
                                 by the cost of that setting (cost = 1 / r)

Suite means weigh every task alike. Retention is told per task and with each task left out, too: a mean that hangs on
one task says little. Pure functions; reads and writes nothing; imports no torch.
Source: arXiv 2602.11937 (relative request rate; retention per effort; generated tokens).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lit_puzzle.report.envelope import Point, cost_at, frontier

RESAMPLES_AT_A_TIME = 1000  # of the bootstrap of these numbers


@dataclass(frozen=True)
class Setting:
    """One model at one effort.

    Attributes:
        accuracy: task -> accuracy, in any unit that is the same for all settings compared.
        tokens: mean generated tokens of a request over the suite.
    """

    accuracy: Mapping[str, float]
    tokens: float

    def suite(self, without: Collection[str] = ()) -> float:
        """Return the accuracy of the suite, the mean over its tasks.

        Args:
            without: tasks to leave out.
        """
        kept = [value for task, value in self.accuracy.items() if task not in without]
        return math.fsum(kept) / len(kept)


@dataclass(frozen=True)
class Model:
    """A parent or a child.

    Attributes:
        settings: effort -> what was measured at it.
        throughput: its best, in generated tokens per second of the hardware that both models are judged on.
    """

    settings: Mapping[str, Setting]
    throughput: float


def check_models(parent: Model, child: Model, reference: str) -> None:
    """Check that two models can be compared.

    Raises:
        ValueError: other efforts or tasks than the parent's, no reference effort, or numbers that are not positive.
    """
    efforts = list(parent.settings)
    if set(child.settings) != set(efforts):
        raise ValueError(f"The parent was evaluated at {efforts}, the child at {list(child.settings)}; use the same.")
    if reference not in efforts:
        raise ValueError(f"reference_effort {reference!r} was given; the efforts are {efforts}.")
    for effort in efforts:
        tasks = [sorted(model.settings[effort].accuracy) for model in (parent, child)]
        if tasks[0] != tasks[1] or not tasks[0]:
            raise ValueError(f"At {effort} effort the parent's tasks are {tasks[0]}, the child's {tasks[1]}.")
    for name, model in (("parent", parent), ("child", child)):
        numbers = {f"throughput of the {name}": model.throughput}
        numbers |= {f"tokens of the {name} at {effort} effort": s.tokens for effort, s in model.settings.items()}
        for what, value in numbers.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{what}: {value} was given; a request rate needs a positive, finite number.")


def relative_request_rates(model: Model, parent: Model, reference: str) -> dict[str, float]:
    """Return the relative request rate of each effort; 1 is the parent's at the reference effort."""
    one = parent.throughput / parent.settings[reference].tokens
    return {effort: model.throughput / setting.tokens / one for effort, setting in model.settings.items()}


def points(model: Model, parent: Model, reference: str) -> list[Point]:
    """Return the settings of a model as points of the plane of cost and accuracy."""
    rates = relative_request_rates(model, parent, reference)
    return [Point(1 / rates[effort], setting.suite(), effort) for effort, setting in model.settings.items()]


def judge(parent: Model, child: Model, reference: str) -> dict[str, float]:
    """Return the headline numbers of a comparison, flat.

    Args:
        parent: the parent.
        child: the child.
        reference: effort at which the parent's request rate is 1.

    Returns:
        Per effort `request_rate/<effort>/parent|child|ratio`, `accuracy/<effort>/parent|child|retention|difference`,
        `tokens/<effort>/parent|child|ratio`, `retention/<effort>/<task>`, `retention/<effort>/without <task>` where
        there are several tasks, and `speed_up/<effort>` at equal accuracy (not where the parent is nowhere as
        accurate); `effort_length_ratio/parent|child` where there are low and high effort. No retention where the
        parent's accuracy is zero.

    Raises:
        ValueError: models that cannot be compared (`check_models`).
    """
    check_models(parent, child, reference)
    rates = [relative_request_rates(model, parent, reference) for model in (parent, child)]
    vertices = frontier(points(parent, parent, reference))
    found: dict[str, float] = {}
    for effort, old in parent.settings.items():
        new = child.settings[effort]
        found |= _pair(f"request_rate/{effort}", rates[0][effort], rates[1][effort], "ratio")
        found |= _pair(f"accuracy/{effort}", old.suite(), new.suite(), "retention")
        found[f"accuracy/{effort}/difference"] = new.suite() - old.suite()
        found |= _pair(f"tokens/{effort}", old.tokens, new.tokens, "ratio")
        for task in old.accuracy if len(old.accuracy) > 1 else ():
            found |= _quotient(f"retention/{effort}/{task}", old.accuracy[task], new.accuracy[task])
            found |= _quotient(f"retention/{effort}/without {task}", old.suite([task]), new.suite([task]))
        cost = cost_at(vertices, new.suite())
        if cost is not None:
            found[f"speed_up/{effort}"] = cost * rates[1][effort]
    for name, model in (("parent", parent), ("child", child)):
        if {"low", "high"} <= set(model.settings):
            ratio = model.settings["high"].tokens / model.settings["low"].tokens
            found[f"effort_length_ratio/{name}"] = ratio
    return found


def _pair(name: str, parent: float, child: float, quotient: str) -> dict[str, float]:
    return {f"{name}/parent": parent, f"{name}/child": child} | _quotient(f"{name}/{quotient}", parent, child)


def _quotient(name: str, parent: float, child: float) -> dict[str, float]:
    return {name: child / parent} if parent else {}
