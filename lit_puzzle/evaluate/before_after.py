"""What a recovery measures and reports: the same held-out prompts before and after, paired, as numbers and as a table.

`after` is of the folder that is written: `load_best`, `save_child` and `reload_child` come first.

Reads and writes: `<run>/before/episodes.parquet`, `<run>/after/episodes.parquet` (a completion a row).
reward/first and reward/last are means over the first and last tenth of the updates that generated. Beside accuracy and
tokens stand the shares of completions that did not end, have no final answer, loop, or answer without thinking.
Source: the tables of accuracy and generated tokens per effort in arXiv 2602.11937.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from lit_puzzle.environments.environment import Environment, PromptAtEffort
from lit_puzzle.environments.episodes import Episode, shares_without
from lit_puzzle.evaluate.accuracy import write_episodes
from lit_puzzle.evaluate.solving import gather_episodes, local_rows, solve_problems
from lit_puzzle.evaluate.summary import compare, split_by_effort, summarize
from lit_puzzle.generation.apart import engines_apart, free_share
from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.lengths import LengthStatistics
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.model.writer import atomic_folder

WHENS = ("before", "after", "parent")
SHARES = ("unfinished", "no_final", "looping", "no_analysis")  # of completions, where they are known


@dataclass(frozen=True)
class EvaluationSettings:
    """How the policy is measured on held-out prompts.

    Args:
        prompts_per_effort: prompts per effort before and after training, the same ones.
        max_new_tokens: cap on generated tokens; default: the cap of training.
        batch_size: prompts generated together on one process.
        seed: which held-out prompts; validation, which chooses the best weights, asks none of them.
        texts: whether the files of episodes hold prompts, completions and right answers.
        engine: what measures before and after, from the folders, in processes of its own, while those of training
            wait; None: the trained model in memory, on all processes, by transformers. Validation does not use it.
    """

    prompts_per_effort: int = 256
    max_new_tokens: int | None = None
    batch_size: int = 128
    seed: int = 1
    texts: bool = True
    engine: EngineSettings | None = None

    def __post_init__(self) -> None:
        if self.engine is not None:
            self.engine.refuse_server("evaluation.engine")
        if self.prompts_per_effort < 2 or self.batch_size < 1 or (self.max_new_tokens or 1) < 1:
            raise ValueError(
                f"{self} was given; prompts_per_effort >= 2, batch_size >= 1 and max_new_tokens >= 1 are needed."
            )


def solve_together(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PromptAtEffort],
    environments: Sequence[Environment],
    max_new_tokens: int,
) -> list[Episode]:
    """Solve problems greedily, each process its share; return the episodes of all, in the order of the problems.

    The root of a sharded model keeps its weights after forward passes: they are given back, for optimizer and
    checkpoints know the sharded ones only.
    """
    rows = local_rows(len(pairs))
    sampling = Sampling(max_new_tokens, temperature=0.0)
    episodes = solve_problems(engine, tokenizer, [pairs[row] for row in rows], environments, sampling, rows)
    for group in engine.model.modules() if isinstance(engine, TransformersEngine) else ():
        if isinstance(group, FSDPModule):
            group.reshard()
    return gather_episodes(episodes)


def solve_folder(
    settings: EngineSettings,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PromptAtEffort],
    environments: Sequence[Environment],
    max_new_tokens: int,
) -> list[Episode]:
    """Solve problems greedily by engines of their own on a checkpoint folder; return the episodes, on every process.

    Every process calls this: the first one starts the engines, the others wait for its episodes.
    """
    sampling, free = Sampling(max_new_tokens, temperature=0.0), free_share()
    found: list[list[Episode] | None] = [None]
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        with engines_apart(settings, folder, free) as engine:
            found = [solve_problems(engine, tokenizer, pairs, environments, sampling)]
    if distributed.is_initialized():
        distributed.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def is_measured(folder: Path, updates: int) -> bool:
    """Return whether a run has evaluated its model before training.

    Args:
        folder: its folder `before`.
        updates: that it has made so far.

    Raises:
        ValueError: it resumes after updates, without this evaluation.
    """
    if not folder.is_dir() and updates > 0:
        raise ValueError(f"{folder} is missing: there is nothing to compare with. Use --overwrite.")
    return folder.is_dir()


def write_evaluation(folder: Path, episodes: Sequence[Episode], is_writer: bool, texts: bool = True) -> None:
    """Write the episodes of an evaluation, whole or not at all; all processes wait until they are there."""
    if is_writer:
        with atomic_folder(folder, replace=True) as scratch:
            write_episodes(scratch, episodes, texts)
    if distributed.is_initialized():
        distributed.barrier()


def validation_values(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means of a validation: `val/accuracy`, and per effort `val/<what>/<effort>`: accuracy, tokens and `SHARES`."""
    values = {"val/accuracy": sum(episode.correct for episode in episodes) / len(episodes)}
    for effort, group in split_by_effort(episodes).items():
        values[f"val/accuracy/{effort}"] = sum(episode.correct for episode in group) / len(group)
        values[f"val/tokens/{effort}"] = sum(episode.generated_tokens for episode in group) / len(group)
        values |= {f"val/{name}/{effort}": share for name, share in ending_shares(group).items()}
    return values


def ending_shares(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return the `SHARES` of at least one episode that are known."""
    shares = {"unfinished": sum(not episode.finished for episode in episodes) / len(episodes)}
    return {name: share for name, share in (shares | shares_without(episodes)).items() if name in SHARES}


def recovery_results(
    before: Sequence[Episode],
    after: Sequence[Episode],
    rewards: Sequence[float],
    parent: Mapping[str, LengthStatistics] = MappingProxyType({}),
) -> dict[str, float]:
    """Return the headline numbers of a recovery, flat.

    Args:
        before: episodes of the child.
        after: episodes of the recovered child, the same problems in the same order.
        rewards: mean reward of every rollout of the run.
        parent: the parent's lengths, where they are known.

    Returns:
        Per effort `accuracy/<effort>/before|after|gain`, each with `_se`, and `tokens/<effort>/before|after|gain` with
        `gain_se`; `tokens/<effort>/parent` and `of_parent` (after / parent); `<share>/<effort>/before|after` of
        `SHARES`; `effort_length_ratio/before|after|parent` (tokens at high / at low effort); `reward/first|last` if
        anything was rolled out.
    """
    paired = compare(before, after)
    results = {}
    groups = {"before": split_by_effort(before), "after": split_by_effort(after)}
    for effort in groups["before"]:
        for when, summary in (("before", summarize(before)), ("after", summarize(after))):
            results[f"accuracy/{effort}/{when}"] = summary[f"accuracy/{effort}"]
            results[f"accuracy/{effort}/{when}_se"] = summary[f"accuracy_se/{effort}"]
            results[f"tokens/{effort}/{when}"] = summary[f"tokens/{effort}"]
        for name in ("accuracy", "tokens"):
            results[f"{name}/{effort}/gain"] = paired[f"{name}_gain/{effort}"]
            results[f"{name}/{effort}/gain_se"] = paired[f"{name}_gain_se/{effort}"]
        if effort in parent:
            results[f"tokens/{effort}/parent"] = parent[effort].mean
            results[f"tokens/{effort}/of_parent"] = results[f"tokens/{effort}/after"] / parent[effort].mean
        for when, by_effort in groups.items():
            shares = ending_shares(by_effort[effort])
            results |= {f"{name}/{effort}/{when}": share for name, share in shares.items()}
    results |= _effort_length_ratios(results)
    if rewards:
        tenth = max(1, len(rewards) // 10)
        results["reward/first"] = sum(rewards[:tenth]) / tenth
        results["reward/last"] = sum(rewards[-tenth:]) / tenth
    return results


def _effort_length_ratios(results: Mapping[str, float]) -> dict[str, float]:
    tokens = {when: [results.get(f"tokens/{effort}/{when}") for effort in ("low", "high")] for when in WHENS}
    return {f"effort_length_ratio/{when}": high / low for when, (low, high) in tokens.items() if low and high}


def print_table(results: Mapping[str, float]) -> None:
    """Print the results: accuracy and tokens, then how completions end; an effort a row."""
    efforts = [key.split("/")[1] for key in results if key.startswith("accuracy/") and key.endswith("/gain")]
    table = Table("effort", "accuracy before", "accuracy after", "gain (paired)", "tokens", title="Recovery")
    for effort in efforts:
        columns = [
            f"{results[f'accuracy/{effort}/{name}']:{sign}.3f} ± {results[f'accuracy/{effort}/{name}_se']:.3f}"
            for name, sign in (("before", ""), ("after", ""), ("gain", "+"))
        ]
        tokens = " → ".join(f"{results[f'tokens/{effort}/{when}']:.1f}" for when in ("before", "after"))
        table.add_row(effort, *columns, tokens)
    Console().print(table)
    _print_endings(results, efforts)


def _print_endings(results: Mapping[str, float], efforts: Sequence[str]) -> None:
    """Print tokens relative to the parent and shares of completions, before → after, in percent."""
    known = [name for name in SHARES if any(f"{name}/{effort}/after" in results for effort in efforts)]
    lengths = any(f"tokens/{effort}/of_parent" in results for effort in efforts)
    headers = ["tokens / parent's"] if lengths else []
    table = Table("effort", *headers, *(f"{name.replace('_', ' ')}, %" for name in known), title="Completions")
    for effort in efforts:
        of_parent = results.get(f"tokens/{effort}/of_parent")
        columns = ["" if of_parent is None else f"{of_parent:.2f}"] if lengths else []
        for name in known:
            shares = [results.get(f"{name}/{effort}/{when}") for when in ("before", "after")]
            columns.append(" → ".join("?" if share is None else f"{100 * share:.1f}" for share in shares))
        table.add_row(effort, *columns)
    Console().print(table)
