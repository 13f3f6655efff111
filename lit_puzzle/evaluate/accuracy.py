"""Accuracy and generated length of a policy on held-out problems, per reasoning effort, with standard errors.

accuracy = mean(c); paired change = mean(d); standard errors as in `lit_puzzle.evaluate.standard_errors`
    c = 1 for a completion with the right answer, else 0; d = after - before on the same problem and sample.
Request efficiency (paper: token throughput / mean generated tokens of a request, relative to the parent at high effort)
needs `tokens/<effort>` from here and a throughput from elsewhere.

Reads: a checkpoint folder. Writes: `episodes.jsonl` (a completion a line, in problem order, of the form of
`lit_puzzle.environments.episodes`), `generation_lengths.json`.
Memory: the weights + the KV cache, see `lit_puzzle.generation.transformers_engine`.
Disk: about 200 bytes a problem and its texts. Traffic: one gather of the episodes.
Source: arXiv 2602.11937 (accuracy and tokens at each effort; relative request rate).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from torch import distributed
from transformers import PreTrainedTokenizerBase

from lit_puzzle.data.prompts import check_lengths
from lit_puzzle.environments.answer_formats import answer_format, fix_format
from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import LEVELS, Environment, PromptAtEffort
from lit_puzzle.environments.episodes import (
    Episode,
    Texts,
    failures,
    problem_number,
    read_rows,
    shares_without,
    write_rows,
)
from lit_puzzle.environments.grading import Ungraded, grade_all
from lit_puzzle.environments.looping import is_looping
from lit_puzzle.environments.problem_identity import names_of, problems_identity
from lit_puzzle.evaluate.baseline import check_problems, take_baseline
from lit_puzzle.evaluate.held_out import HeldOut
from lit_puzzle.evaluate.standard_errors import mean_and_error, prompts_of
from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.lengths import length_statistics, write_lengths
from lit_puzzle.generation.load import load_engine
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.kv_cache.fp8_cache import Fp8Cache, scales_for
from lit_puzzle.kv_cache.scales import META_FILE, ScalePair, scales_identity
from lit_puzzle.model.chat import fix_date
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.model.tokens import token_ids
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import Identity, claim_inputs, file_identity, record_output, run_date

EPISODES_FILE = "episodes.jsonl"


def solve_problems(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[PromptAtEffort],
    environments: Sequence[Environment],
    sampling: Sampling,
    rows: Sequence[int] | None = None,
) -> list[Episode]:
    """Generate a completion for each problem and verify it.

    Args:
        engine: the policy.
        tokenizer: of the policy, with a chat template.
        problems: problems at their efforts.
        environments: verify the completions.
        sampling: how completions are drawn.
        rows: number of each problem among those of all processes; None: 0, 1, 2, ...

    Returns:
        The episodes, in the order of the problems.

    Raises:
        ValueError: a problem of an unknown environment.
    """
    known = {environment.name for environment in environments}
    unknown = sorted({problem.environment for problem, _ in problems} - known)
    if unknown:
        raise ValueError(f"Problems of environments {unknown} were given; the environments are {sorted(known)}.")
    prompts = [render_prompt(tokenizer, problem, effort) for problem, effort in problems]
    prompt_ids = [token_ids(tokenizer, prompt) for prompt in prompts]
    numbers = range(len(problems)) if rows is None else rows
    form = answer_format(tokenizer)
    completions = list(engine.generate(prompt_ids, sampling, rows))
    texts = [str(tokenizer.decode(completion.token_ids, skip_special_tokens=False)) for completion in completions]
    ungraded = [
        Ungraded(problem.environment, form.parse(text), problem.answer, completion.finish)
        for (problem, _), text, completion in zip(problems, texts, completions, strict=True)
    ]
    verdicts = grade_all(environments, ungraded)
    episodes = []
    for index, (problem, effort) in enumerate(problems):
        completion = completions[index]
        episode = Episode(
            environment=problem.environment,
            effort=effort,
            problem=problem_number(problem),
            verdict=replace(
                verdicts[index],
                analysis=ungraded[index].parsed.analysis is not None if form.thinks else None,
                looping=is_looping(completion.token_ids),
            ),
            generated_tokens=len(completion.token_ids),
            finish=completion.finish,
            seed=sampling.seed,
            row=numbers[index],
            seconds=completion.seconds,
            texts=Texts(prompts[index], texts[index], problem.answer),
        )
        episodes.append(episode)
    return episodes


def local_rows(count: int) -> range:
    """Return the numbers of the problems that this process solves: rank, rank + processes, ..."""
    if not distributed.is_initialized():
        return range(count)
    return range(distributed.get_rank(), count, distributed.get_world_size())


def gather_episodes(episodes: Sequence[Episode]) -> list[Episode]:
    """Return the episodes of all processes in the order of the problems before `local_rows`, on every process."""
    if not distributed.is_initialized():
        return list(episodes)
    shares: list[list[Episode]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(shares, list(episodes))
    world = len(shares)
    return [shares[index % world][index // world] for index in range(sum(len(share) for share in shares))]


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


def split_by_effort(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """Episodes of each effort that occurs, low to high, each in the order given."""
    groups = {effort: [e for e in episodes if e.effort == effort] for effort in LEVELS}
    return {effort: group for effort, group in groups.items() if group}


def write_episodes(folder: Path, episodes: Sequence[Episode], texts: bool = True) -> None:
    """Write `episodes.jsonl`, with prompts and completions or without."""
    write_rows(folder / EPISODES_FILE, episodes, texts)


def read_episodes(folder: Path) -> list[Episode]:
    """Read the `episodes.jsonl` of an evaluation's run folder."""
    file = folder / EPISODES_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {folder} is no finished run of recipes/evaluate.yaml.")
    return read_rows(file)


def evaluate(
    run_dir: Path,
    checkpoint: Path,
    held_out: HeldOut,
    sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008  (frozen)
    engine: EngineSettings = EngineSettings(),  # noqa: B008
    baseline: Path | None = None,
    kv_cache: Literal["model", "fp8"] = "model",
    kv_scales: Path | None = None,
) -> dict[str, float]:
    """Evaluate any checkpoint folder, a stock gpt-oss parent or a child, on held-out problems.

    Args:
        run_dir: the run's folder; gets `episodes.jsonl` and `generation_lengths.json`.
        checkpoint: folder of the model and its tokenizer.
        held_out: which problems, at which efforts.
        sampling: how completions are drawn; one that `max_new_tokens` cuts off counts as wrong.
        engine: what runs the model.
        baseline: run folder of another evaluation of the same problems, to compare with (paired).
        kv_cache: `fp8` simulates an FP8 KV cache, rounded to nearest; `model` stores what the model computes.
        kv_scales: folder of the scales of that cache; none: those in the checkpoint, or 1.

    Returns:
        The numbers of `summarize`, and of `compare` (this run - baseline) if there is a baseline.

    Raises:
        ValueError: missing folders, too few held-out problems, a baseline of other problems, KV scales of
            another checkpoint, a simulated cache in vLLM, or log-probabilities, which an evaluation has no use for.
    """
    checkpoint = require_input(checkpoint, "checkpoint", "config.json")
    if kv_cache == "model" and kv_scales is not None:
        raise ValueError(f"kv_scales={kv_scales} was given without an FP8 cache. Set kv_cache: fp8, or leave it out.")
    if kv_cache == "fp8" and engine.name == "vllm":
        raise ValueError(
            "kv_cache: fp8 is simulated with transformers; vLLM has one of its own. Set engine.name: auto."
        )
    sampling.refuse_logprobs("An evaluation")
    if sampling.temperature == 0 and held_out.samples_per_prompt > 1:
        raise ValueError(
            f"held_out.samples_per_prompt {held_out.samples_per_prompt} was given with sampling.temperature 0: all "
            "samples of a prompt would be the same. Set a temperature above 0, or one sample per prompt."
        )
    if kv_scales is not None:
        kv_scales = require_input(kv_scales, "folder of KV scales", META_FILE)
    if baseline is not None:
        baseline = require_input(baseline, "baseline", EPISODES_FILE)
    scales = scales_for(checkpoint, kv_scales) if kv_cache == "fp8" else None
    before = None if baseline is None else read_episodes(baseline)
    problems = held_out.problems()
    identity = checkpoint_identity(checkpoint)
    if baseline is not None and before is not None:
        check_problems(before, problems, baseline / EPISODES_FILE)
        take_baseline(run_dir, identity, baseline)
    tokenizer = load_tokenizer(checkpoint)
    fix_date(tokenizer, run_date(run_dir))
    fix_format(tokenizer, held_out.answer_format)
    check_lengths(tokenizer, problems, checkpoint, sampling.max_new_tokens)
    asked = problems_identity(names_of(held_out.environments), problems)
    claim_inputs(run_dir, {"checkpoint": identity, "held_out": asked} | _other_inputs(kv_scales, baseline))
    loaded = load_engine(engine, checkpoint) if scales is None else load_with_fp8_cache(engine, checkpoint, scales)
    episodes = solve_problems(loaded, tokenizer, problems, held_out.environments, sampling)
    write_episodes(run_dir, episodes, held_out.texts)
    record_output(run_dir, "episodes", file_identity(run_dir, [EPISODES_FILE]))
    lengths = {
        effort: length_statistics([e.generated_tokens for e in group])
        for effort, group in split_by_effort(episodes).items()
    }
    write_lengths(run_dir, lengths)
    results = summarize(episodes) | ({} if before is None else compare(before, episodes))
    print_table(results, list(lengths))
    return results


def _other_inputs(kv_scales: Path | None, baseline: Path | None) -> dict[str, Identity]:
    found = {}
    if kv_scales is not None:
        found["kv_scales"] = scales_identity(kv_scales)
    if baseline is not None:
        found["baseline"] = file_identity(baseline, [EPISODES_FILE])
    return found


def load_with_fp8_cache(settings: EngineSettings, checkpoint: Path, scales: Sequence[ScalePair | None]) -> Engine:
    """Load a checkpoint folder into transformers, with a simulated FP8 KV cache."""
    policy, tokenizer = load_policy(checkpoint, settings.dtype)
    return TransformersEngine(policy, tokenizer, settings.batch_size, partial(Fp8Cache, policy.config, scales))


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
