"""Accuracy and generated length of a policy on held-out problems, per reasoning effort, with standard errors.

accuracy = mean(c); paired change = mean(d); standard errors as in `lit_puzzle.evaluate.standard_errors`
    c = 1 for a completion with the right answer, else 0; d = after - before on the same problem and sample.
Request efficiency (paper: token throughput / mean generated tokens of a request, relative to the parent at high effort)
needs `tokens/<effort>` from here and a throughput from elsewhere.

Reads: a checkpoint folder. Writes: `episodes.parquet` (a completion a row, in problem order, of the form of
`lit_puzzle.environments.episodes`), `generation_lengths.json`; until then `blocks/`, a file of episodes for each block
of problems that is finished, and the completions of the one at work. Resumable: the same command generates the
completions that are missing and ends with the same episodes, but for `seconds` and where rounding decides.
Memory: the weights + the KV cache, see `lit_puzzle.generation.transformers_engine`.
Disk: about 200 bytes a problem and its texts. Traffic: one gather of the episodes.
Source: arXiv 2602.11937 (accuracy and tokens at each effort; relative request rate).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Literal

from lit_puzzle.data.prompts import check_lengths
from lit_puzzle.environments.answer_formats import fix_format
from lit_puzzle.environments.episodes import EPISODES_FILE, Episode, read_rows, write_rows
from lit_puzzle.environments.problem_identity import names_of, problems_identity
from lit_puzzle.evaluate.alike import check_alike
from lit_puzzle.evaluate.baseline import check_problems, take_baseline
from lit_puzzle.evaluate.held_out import HeldOut
from lit_puzzle.evaluate.solving import solve_in_blocks, solve_problems
from lit_puzzle.evaluate.summary import (
    by_environment,
    compare,
    print_environments,
    print_table,
    split_by_effort,
    summarize,
)
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
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.inputs import claim_inputs, record_output, run_date

BLOCKS = "blocks"  # folder of the blocks that are finished; removed once all of them are


def write_episodes(folder: Path, episodes: Sequence[Episode], texts: bool = True) -> None:
    """Write `episodes.parquet`, with prompts and completions or without."""
    write_rows(folder / EPISODES_FILE, episodes, texts)


def read_episodes(folder: Path) -> list[Episode]:
    """Read the `episodes.parquet` of an evaluation's run folder."""
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
        run_dir: the run's folder; gets `episodes.parquet` and `generation_lengths.json`.
        checkpoint: folder of the model and its tokenizer.
        held_out: which problems, at which efforts.
        sampling: how completions are drawn; one that `max_new_tokens` cuts off counts as wrong.
        engine: what runs the model.
        baseline: run folder of another evaluation of the same problems, to compare with (paired).
        kv_cache: `fp8` simulates an FP8 KV cache, rounded to nearest; `model` stores what the model computes.
        kv_scales: folder of the scales of that cache; none: those in the checkpoint, or 1.

    Returns:
        The numbers of `summarize` and `by_environment`, and of `compare` (this run - baseline) if there is a baseline.

    Raises:
        ValueError: missing folders, too few held-out problems, a baseline of other problems, KV scales of
            another checkpoint, a simulated cache in vLLM, or log-probabilities, which an evaluation has no use for.
    """
    checkpoint = require_input(checkpoint, "checkpoint", "config.json")
    _check_settings(held_out, sampling, engine, kv_cache, kv_scales)
    if kv_scales is not None:
        kv_scales = require_input(kv_scales, "folder of KV scales", META_FILE)
    if baseline is not None:
        baseline = require_input(baseline, "baseline", EPISODES_FILE)
    scales = scales_for(checkpoint, kv_scales) if kv_cache == "fp8" else None
    before = None if baseline is None else read_episodes(baseline)
    problems = held_out.problems()
    identity = checkpoint_identity(checkpoint)
    asked = problems_identity(names_of(held_out.environments), problems)
    if baseline is not None and before is not None:
        check_problems(before, problems, baseline / EPISODES_FILE)
        check_alike({"baseline": baseline, "run": run_dir}, asked)
        take_baseline(run_dir, identity, baseline)
    tokenizer = load_tokenizer(checkpoint)
    fix_date(tokenizer, run_date(run_dir))
    fix_format(tokenizer, held_out.answer_format)
    check_lengths(tokenizer, problems, checkpoint, sampling.max_new_tokens)
    claim_inputs(run_dir, {"checkpoint": identity, "held_out": asked} | _other_inputs(kv_scales, baseline))

    def load() -> Engine:
        return load_engine(engine, checkpoint) if scales is None else load_with_fp8_cache(engine, checkpoint, scales)

    def solve(loaded: Engine, rows: range, log: Path) -> list[Episode]:
        share = problems[rows.start : rows.stop]
        return solve_problems(loaded, tokenizer, share, held_out.environments, sampling, rows, log)

    if not (run_dir / EPISODES_FILE).is_file():  # else an attempt that was killed had finished them
        solved = solve_in_blocks(run_dir / BLOCKS, load, solve, len(problems), held_out.block_size, held_out.texts)
        write_episodes(run_dir, solved, held_out.texts)
    rmtree(run_dir / BLOCKS, ignore_errors=True)
    episodes = read_episodes(run_dir)
    record_output(run_dir, "episodes", file_identity(run_dir, [EPISODES_FILE]))
    lengths = {
        effort: length_statistics([e.generated_tokens for e in group])
        for effort, group in split_by_effort(episodes).items()
    }
    write_lengths(run_dir, lengths)
    results = summarize(episodes) | ({} if before is None else compare(before, episodes))
    results |= by_environment(episodes, before)
    print_table(results, list(lengths))
    print_environments(results, episodes)
    return results


def _check_settings(
    held_out: HeldOut, sampling: Sampling, engine: EngineSettings, kv_cache: str, kv_scales: Path | None
) -> None:
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
