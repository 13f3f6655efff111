"""Accuracy and generated length of a policy on held-out problems, per reasoning effort, with standard errors.

accuracy = mean(c), standard error = s(c) / sqrt(n); paired change = mean(d), standard error = s(d) / sqrt(n)
    c = 1 for a right answer, else 0; d = after - before on the same problem; s = sample standard deviation (n - 1);
    n = number of problems.
Request efficiency (paper: token throughput / mean generated tokens of a request, relative to the parent at high effort)
needs `tokens/<effort>` from here and a throughput from elsewhere.

Reads: a checkpoint folder. Writes: `episodes.jsonl` (an answer a line, in problem order), `generation_lengths.json`.
Memory: the weights + the KV cache, batch_size * 2 * KV heads * head_dim * bytes per value * sum over layers of
min(window, prompt + max_new_tokens). Disk: about 120 bytes a problem. Traffic: one gather of the episodes.
Source: arXiv 2602.11937 (accuracy and tokens at each effort; relative request rate).
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.environments.environment import EFFORTS, Environment, Problem, draw, render_prompt
from lit_puzzle.generation.batches import MakeCache, evaluation_mode, generate_in_batches
from lit_puzzle.generation.lengths import length_statistics, write_lengths
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.kv_cache.fp8_cache import Fp8Cache, scales_for
from lit_puzzle.model.loading import DtypeName
from lit_puzzle.run.folder import require_input

EPISODES_FILE = "episodes.jsonl"


@dataclass(frozen=True)
class Episode:
    """One answered problem; `problem` is the crc32 of its text, by which a paired comparison knows it again."""

    environment: str
    effort: str
    correct: float
    generated_tokens: int
    finished: bool
    problem: int = 0


def answer_problems(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[tuple[Problem, str]],
    environments: Sequence[Environment],
    max_new_tokens: int,
    batch_size: int,
    make_cache: MakeCache | None = None,
) -> list[Episode]:
    """Answers problems greedily, in batches of like length; the episodes come in the order of the problems.

    Deterministic; the modules' train/eval modes and the random state are left as they were. Over processes:
    `gather_episodes(answer_problems(..., local_share(problems), ...))`. The number of decoding steps differs between
    processes, so sharded weights must be gathered (unsharded) before. `make_cache` gives another KV cache than the
    model's own.

    Raises:
        ValueError: a problem of an unknown environment, or no way to tell the end of an answer or the padding.
    """
    by_name = {environment.name: environment for environment in environments}
    unknown = sorted({problem.environment for problem, _ in problems} - set(by_name))
    if unknown:
        raise ValueError(f"Problems of environments {unknown} were given; the environments are {sorted(by_name)}.")
    prompts = [render_prompt(tokenizer, problem, effort) for problem, effort in problems]
    prompt_ids = [list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    order = sorted(range(len(problems)), key=lambda i: (EFFORTS.index(problems[i][1]), len(prompt_ids[i]), i))
    with evaluation_mode(policy):
        answers = generate_in_batches(policy, tokenizer, prompt_ids, order, max_new_tokens, batch_size, make_cache)
    episodes = []
    for (problem, effort), (token_ids, finished) in zip(problems, answers, strict=True):
        text = str(tokenizer.decode(token_ids, skip_special_tokens=False))
        correct = by_name[problem.environment].verify(text, problem.answer)
        identity = zlib.crc32(problem.text().encode())
        episodes.append(Episode(problem.environment, effort, correct, len(token_ids), finished, identity))
    return episodes


def local_share(problems: Sequence[tuple[Problem, str]]) -> Sequence[tuple[Problem, str]]:
    """The problems that this process answers: problems[rank::processes]."""
    if not distributed.is_initialized():
        return problems
    return problems[distributed.get_rank() :: distributed.get_world_size()]


def gather_episodes(episodes: Sequence[Episode]) -> list[Episode]:
    """The episodes of all processes in the order of the problems before `local_share`, on every process."""
    if not distributed.is_initialized():
        return list(episodes)
    shares: list[list[Episode]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(shares, list(episodes))
    world = len(shares)
    return [shares[index % world][index // world] for index in range(sum(len(share) for share in shares))]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error.

    Raises:
        ValueError: fewer than two values (no standard error exists).
    """
    if len(values) < 2:
        raise ValueError(
            f"{len(values)} answers at one effort: a standard error needs two. Ask more prompts per effort."
        )
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarize(episodes: Sequence[Episode]) -> dict[str, float]:
    """Headline numbers of a set of episodes.

    Returns:
        `accuracy` (all episodes) and per effort `accuracy/<effort>`, `accuracy_se/<effort>`, `tokens/<effort>`,
        `tokens_se/<effort>` and `finished/<effort>` (share that ended by itself); per effort and environment
        `accuracy/<effort>/<environment>`, `tokens/<effort>/<environment>`, `finished/<effort>/<environment>`.
    """
    results = {"accuracy": mean_and_error([episode.correct for episode in episodes])[0]}
    for effort, group in split_by_effort(episodes).items():
        numbers = {"accuracy": [e.correct for e in group], "tokens": [float(e.generated_tokens) for e in group]}
        for name, values in numbers.items():
            results[f"{name}/{effort}"], results[f"{name}_se/{effort}"] = mean_and_error(values)
        results[f"finished/{effort}"] = sum(e.finished for e in group) / len(group)
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
        ValueError: the two are not answers to the same problems in the same order.
    """
    problems = [[(e.environment, e.effort, e.problem) for e in episodes] for episodes in (before, after)]
    if problems[0] != problems[1]:
        raise ValueError(
            f"{len(before)} answers before and {len(after)} after are not to the same problems in the same order. "
            "Evaluate both with the same environments, efforts, prompts_per_effort and seed."
        )
    results = {}
    after_by_effort = split_by_effort(after)
    for effort, old in split_by_effort(before).items():
        pairs = list(zip(old, after_by_effort[effort], strict=True))
        correct = mean_and_error([b.correct - a.correct for a, b in pairs])
        tokens = mean_and_error([float(b.generated_tokens - a.generated_tokens) for a, b in pairs])
        results[f"accuracy_gain/{effort}"], results[f"accuracy_gain_se/{effort}"] = correct
        results[f"tokens_gain/{effort}"], results[f"tokens_gain_se/{effort}"] = tokens
    return results


def split_by_effort(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """Episodes of each effort that occurs, low to high, each in the order given."""
    groups = {effort: [e for e in episodes if e.effort == effort] for effort in EFFORTS}
    return {effort: group for effort, group in groups.items() if group}


def write_episodes(folder: Path, episodes: Sequence[Episode]) -> None:
    """Writes `episodes.jsonl`."""
    (folder / EPISODES_FILE).write_text("".join(json.dumps(asdict(episode)) + "\n" for episode in episodes))


def read_episodes(folder: Path) -> list[Episode]:
    """Reads the `episodes.jsonl` of an evaluation's run folder."""
    file = folder / EPISODES_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {folder} is no finished run of recipes/evaluate.yaml.")
    return [Episode(**json.loads(line)) for line in file.read_text().splitlines()]


def held_out_problems(
    environments: Sequence[Environment], efforts: Sequence[str], prompts_per_effort: int, seed: int
) -> list[tuple[Problem, str]]:
    """The same held-out problems at each effort, one effort after the other."""
    return [
        pair for effort in efforts for pair in draw(environments, [effort], prompts_per_effort, seed, held_out=True)
    ]


def evaluate(
    run_dir: Path,
    checkpoint: Path,
    environments: list[Environment],
    efforts: list[str],
    prompts_per_effort: int = 256,
    max_new_tokens: int = 96,
    batch_size: int = 128,
    seed: int = 0,
    dtype: DtypeName = "float32",
    baseline: Path | None = None,
    kv_cache: Literal["model", "fp8"] = "model",
    kv_scales: Path | None = None,
) -> dict[str, float]:
    """Evaluates any checkpoint folder, a stock gpt-oss parent or a child, on held-out problems.

    Args:
        run_dir: the run's folder; gets `episodes.jsonl` and `generation_lengths.json`.
        checkpoint: folder of the model and its tokenizer.
        environments: what to ask; they take turns.
        efforts: reasoning efforts; each is asked the same problems.
        prompts_per_effort: held-out problems at each effort.
        max_new_tokens: an answer is cut off there (and counts as wrong).
        batch_size: prompts decoded together.
        seed: which held-out problems.
        dtype: precision of the weights.
        baseline: run folder of another evaluation of the same problems, to compare with (paired).
        kv_cache: `fp8` simulates an FP8 KV cache, rounded to nearest; `model` stores what the model computes.
        kv_scales: folder of the scales of that cache; none: those in the checkpoint, or 1.

    Returns:
        The numbers of `summarize`, and of `compare` (this run - baseline) if there is a baseline.

    Raises:
        ValueError: missing folders, bad counts, too few held-out problems, a baseline that asked other problems, or
            KV scales of another checkpoint.
    """
    checkpoint = require_input(checkpoint, "checkpoint")
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no config.json. Give the folder of a parent or of an assembled child.")
    if min(prompts_per_effort, 2) < 2 or min(max_new_tokens, batch_size) < 1:
        raise ValueError(
            f"prompts_per_effort {prompts_per_effort}, max_new_tokens {max_new_tokens}, batch_size {batch_size} were "
            "given; at least 2, 1 and 1 are needed."
        )
    if kv_cache == "model" and kv_scales is not None:
        raise ValueError(f"kv_scales={kv_scales} was given without an FP8 cache. Set kv_cache: fp8, or leave it out.")
    scales = scales_for(checkpoint, kv_scales) if kv_cache == "fp8" else None
    before = None if baseline is None else read_episodes(baseline)
    problems = held_out_problems(environments, efforts, prompts_per_effort, seed)
    policy, tokenizer = load_policy(checkpoint, dtype)
    make_cache = None if scales is None else partial(Fp8Cache, policy.config, scales)
    episodes = answer_problems(policy, tokenizer, problems, environments, max_new_tokens, batch_size, make_cache)
    write_episodes(run_dir, episodes)
    lengths = {
        effort: length_statistics([e.generated_tokens for e in group])
        for effort, group in split_by_effort(episodes).items()
    }
    write_lengths(run_dir, lengths)
    results = summarize(episodes) | ({} if before is None else compare(before, episodes))
    print_table(results, list(lengths))
    return results


def print_table(results: dict[str, float], efforts: Sequence[str]) -> None:
    """Prints the numbers of an evaluation, an effort a row."""
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
