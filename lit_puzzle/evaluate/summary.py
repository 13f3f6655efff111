"""Numbers of a set of episodes per reasoning effort, and the paired changes between two of them.

    accuracy = mean(c); paired change = mean(d); standard errors as in `lit_puzzle.evaluate.standard_errors`
        c = 1 for a completion with the right answer, else 0; d = after - before on the same problem and sample.

Pure functions; reads and writes nothing. Source: arXiv 2602.11937 (accuracy and tokens at each effort).
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lit_puzzle.environments.environment import LEVELS
from lit_puzzle.environments.episodes import Episode, failures, shares_without
from lit_puzzle.evaluate.standard_errors import mean_and_error, prompts_of


def summarize(episodes: Sequence[Episode]) -> dict[str, float]:
    """Headline numbers of a set of episodes.

    Returns:
        `accuracy` and `grader_failures` (completions that a grader failed on) of all episodes; per effort
        `accuracy/<effort>`, `accuracy_se/<effort>`, `tokens/<effort>`, `tokens_se/<effort>` and `finished/<effort>`
        (share that ended by itself), `no_final/<effort>` and `tool_calls/<effort>` (shares without a final answer, and
        that end by calling a tool), `looping/<effort>` (share that ends in a loop, where that is known) and, where
        thinking stands apart, `no_analysis/<effort>` (share without it); per effort and environment
        `accuracy/<effort>/<environment>`, `tokens/<effort>/<environment>`, `finished/<effort>/<environment>`.
    """
    results = {"accuracy": mean_and_error([e.correct for e in episodes], prompts_of(episodes))[0]}
    results["grader_failures"] = float(failures(episodes))
    for effort, group in split_by_effort(episodes).items():
        numbers = {"accuracy": [e.correct for e in group], "tokens": [float(e.generated_tokens) for e in group]}
        for name, values in numbers.items():
            results[f"{name}/{effort}"], results[f"{name}_se/{effort}"] = mean_and_error(values, prompts_of(group))
        results[f"finished/{effort}"] = sum(e.finished for e in group) / len(group)
        results |= {f"{name}/{effort}": share for name, share in shares_without(group).items()}
        for environment in sorted({e.environment for e in group}):
            part = [e for e in group if e.environment == environment]
            results[f"accuracy/{effort}/{environment}"] = sum(e.correct for e in part) / len(part)
            results[f"tokens/{effort}/{environment}"] = sum(e.generated_tokens for e in part) / len(part)
            results[f"finished/{effort}/{environment}"] = sum(e.finished for e in part) / len(part)
    return results


def compare(before: Sequence[Episode], after: Sequence[Episode]) -> dict[str, float]:
    """Paired changes of accuracy and tokens at each effort.

    Returns:
        `accuracy_gain/<effort>`, `accuracy_gain_se/<effort>`, `tokens_gain/<effort>`, `tokens_gain_se/<effort>`.

    Raises:
        ValueError: the two are not of the same problems in the same order.
    """
    problems = [[(e.environment, e.effort, e.problem) for e in episodes] for episodes in (before, after)]
    if problems[0] != problems[1]:
        raise ValueError(
            f"{len(before)} completions before and {len(after)} after are not of the same problems in the same order. "
            "Evaluate both with the same environments, efforts, prompts_per_effort and seed."
        )
    results = {}
    after_by_effort = split_by_effort(after)
    for effort, old in split_by_effort(before).items():
        pairs = list(zip(old, after_by_effort[effort], strict=True))
        correct = mean_and_error([b.correct - a.correct for a, b in pairs], prompts_of(old))
        tokens = mean_and_error([float(b.generated_tokens - a.generated_tokens) for a, b in pairs], prompts_of(old))
        results[f"accuracy_gain/{effort}"], results[f"accuracy_gain_se/{effort}"] = correct
        results[f"tokens_gain/{effort}"], results[f"tokens_gain_se/{effort}"] = tokens
    return results


def by_environment(episodes: Sequence[Episode], before: Sequence[Episode] | None = None) -> dict[str, float]:
    """Return errors, and paired changes from other episodes of the same problems, of each effort and environment.

    Returns:
        `accuracy_se/<effort>/<environment>`; with `before` also `accuracy_gain/<effort>/<environment>` and
        `accuracy_gain_se/<effort>/<environment>`. Nothing for an environment with fewer than two prompts.
    """
    groups: dict[str, list[int]] = {}
    for place, episode in enumerate(episodes):
        groups.setdefault(f"{episode.effort}/{episode.environment}", []).append(place)
    results = {}
    for name, places in groups.items():
        group = [episodes[place] for place in places]
        if len(set(prompts_of(group))) < 2:
            continue
        results[f"accuracy_se/{name}"] = mean_and_error([e.correct for e in group], prompts_of(group))[1]
        if before is not None:
            changes = [episodes[place].correct - before[place].correct for place in places]
            gain = mean_and_error(changes, prompts_of(group))
            results[f"accuracy_gain/{name}"], results[f"accuracy_gain_se/{name}"] = gain
    return results


def split_by_effort(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """Episodes of each effort that occurs, low to high, each in the order given."""
    groups = {effort: [e for e in episodes if e.effort == effort] for effort in LEVELS}
    return {effort: group for effort, group in groups.items() if group}


def print_table(results: dict[str, float], efforts: Sequence[str]) -> None:
    """Print the numbers of an evaluation, an effort a row."""
    table = Table("effort", "accuracy", "tokens", "ended by itself", "accuracy - baseline", title="Evaluation")
    for effort in efforts:
        table.add_row(
            effort,
            f"{results[f'accuracy/{effort}']:.3f} ± {results[f'accuracy_se/{effort}']:.3f}",
            f"{results[f'tokens/{effort}']:.1f} ± {results[f'tokens_se/{effort}']:.1f}",
            f"{results[f'finished/{effort}']:.3f}",
            f"{results[f'accuracy_gain/{effort}']:+.3f} ± {results[f'accuracy_gain_se/{effort}']:.3f}"
            if f"accuracy_gain/{effort}" in results
            else "",
        )
    Console().print(table)


def print_environments(results: dict[str, float], episodes: Sequence[Episode]) -> None:
    """Print accuracy by environment, where there are several: a line for each effort and environment."""
    names = [f"{episode.effort}/{episode.environment}" for episode in episodes]
    if len({name.partition("/")[2] for name in names}) < 2:
        return
    table = Table("effort/environment", "completions", "accuracy", "accuracy - baseline")
    for name in dict.fromkeys(names):
        cells = [
            f"{results[f'{what}/{name}']:{form}} ± {results[f'{what}_se/{name}']:.3f}"
            if f"{what}_se/{name}" in results
            else ""
            for what, form in (("accuracy", ".3f"), ("accuracy_gain", "+.3f"))
        ]
        table.add_row(name, str(names.count(name)), *cells)
    Console().print(table)
