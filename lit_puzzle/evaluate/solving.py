"""Problems -> graded completions: all at once, shared among processes, or block after block with a file for each.

Reads and writes with `solve_in_blocks`: a file of episodes for each finished block, and a log of the completions of the
one at work (`lit_puzzle.evaluate.completion_log`). What has its file, or its line in the log, is not generated again. A
completion is drawn with random numbers of (seed, number of the problem, position): a run that was killed ends with the
episodes of one that was not, except where rounding decides.
Memory: the engine's, and the texts of all episodes. Traffic: one gather of the episodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import distributed
from transformers import PreTrainedTokenizerBase

from lit_puzzle.environments.answer_formats import answer_format
from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import Environment, PromptAtEffort
from lit_puzzle.environments.episodes import Episode, Request, Texts, problem_number, read_rows, write_rows
from lit_puzzle.environments.grading import Ungraded, grade_all
from lit_puzzle.environments.looping import is_looping
from lit_puzzle.evaluate.completion_log import generate_missing
from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.model.tokens import token_ids

LOG = ".completions.jsonl"  # beside the file of a block, until it is finished


def solve_problems(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[PromptAtEffort],
    environments: Sequence[Environment],
    sampling: Sampling,
    rows: Sequence[int] | None = None,
    log: Path | None = None,
) -> list[Episode]:
    """Generate a completion for each problem and verify it.

    Args:
        engine: the policy.
        tokenizer: of the policy, with a chat template.
        problems: problems at their efforts.
        environments: verify the completions.
        sampling: how completions are drawn.
        rows: number of each problem among those of all processes; None: 0, 1, 2, ...
        log: file of completions that were generated before, to which new ones are added; None: there is none.

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
    if log is None:
        completions = list(engine.generate(prompt_ids, sampling, rows))
    else:
        completions = generate_missing(engine, prompt_ids, sampling, numbers, log)
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
            request=Request(len(prompt_ids[index]), completion.seconds),
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


def solve_in_blocks(
    folder: Path,
    load: Callable[[], Engine],
    solve: Callable[[Engine, range, Path], list[Episode]],
    total: int,
    block_size: int,
    texts: bool,
) -> list[Episode]:
    """Solve problems block after block, beginning with the first block that has no file yet.

    Args:
        folder: gets a file of episodes for each block.
        load: makes the engine; it is not called where all files are there.
        solve: returns the episodes of a range of problems, numbered as among all of them; with their log.
        total: number of problems.
        block_size: problems of a block.
        texts: whether the files hold prompts, completions and right answers.

    Returns:
        The episodes of all problems, in their order, as the files hold them.

    Raises:
        ValueError: a file holds other episodes than those of its block.
    """
    blocks = [range(start, min(start + block_size, total)) for start in range(0, total, block_size)]
    files = [folder / f"block-{number:05d}.parquet" for number in range(len(blocks))]
    pairs = enumerate(zip(files, blocks, strict=True))
    finished = {number: _read_block(file, rows) for number, (file, rows) in pairs if file.is_file()}
    missing = [number for number in range(len(blocks)) if number not in finished]
    if missing:
        engine = load()
        folder.mkdir(exist_ok=True)  # not before: what is refused leaves nothing behind
        for number in missing:
            log = files[number].with_suffix(LOG)
            write_rows(files[number], solve(engine, blocks[number], log), texts)
            log.unlink(missing_ok=True)
            finished[number] = _read_block(files[number], blocks[number])
    return [episode for number in range(len(blocks)) for episode in finished[number]]


def _read_block(file: Path, rows: range) -> list[Episode]:
    episodes = read_rows(file)
    if [episode.row for episode in episodes] != list(rows):
        raise ValueError(
            f"{file} has {len(episodes)} episodes, not those of problems {rows.start} to {rows.stop - 1}. Remove the "
            "file, and run the same command again."
        )
    return episodes
