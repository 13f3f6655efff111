"""Prompts: problems of environments, or messages of yours from a file, each at its own reasoning effort.

Reads prompts as JSON lines, a Parquet file, or a folder that Hugging Face `datasets` saved (`save_to_disk`); each row
has `messages` ([{"role": text, "content": text}, ...], without the answer) or `prompt` (text of the user), and may have
`environment` (a name for the counts). Writes nothing.

Training and evaluation never meet here either: the eighth of all problems that is held out, which
`lit_puzzle.environments.environment.is_held_out` decides by their text, is never a prompt, whatever file it stands in.

Memory: all prompts as text.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.environments.environment import (
    EFFORTS,
    Problem,
    PromptAtEffort,
    draw,
    effort_weights,
    is_held_out,
    render_prompt,
)
from lit_puzzle.environments.problem_identity import names_of, problems_identity
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import Identity

FORM = '{"messages": [{"role": ..., "content": ...}]} or {"prompt": text}, and optionally "environment": text'


def choose(source: PromptSource) -> list[PromptAtEffort]:
    """Return problems and efforts in order; equal sources give equal ones.

    Raises:
        ValueError: neither a file nor environments or both, too few prompts, or rows of another form.
    """
    weights = effort_weights(source.efforts or EFFORTS)
    if (source.file is None) == (source.environments is None):
        raise ValueError("Give either a file of prompts or environments (problems are drawn from them).")
    if source.environments is not None:
        if source.num_prompts is None:
            raise ValueError("Environments draw without end: give num_prompts.")
        return draw(source.environments, weights, source.num_prompts, source.seed, held_out=False)
    assert source.file is not None
    problems = read_prompts(source.file)
    training = [problem for problem in problems if not is_held_out(problem)]
    wanted = len(training) if source.num_prompts is None else source.num_prompts
    if not training or wanted > len(training):
        raise ValueError(
            f"{source.file} holds {len(problems)} prompts, {len(training)} of them outside the held-out eighth; "
            f"{wanted} were asked for. Give more prompts or a smaller num_prompts."
        )
    random.Random(f"order {source.seed}").shuffle(training)
    chosen = random.Random(f"efforts {source.seed}").choices(list(weights), list(weights.values()), k=wanted)
    return list(zip(training[:wanted], chosen, strict=True))


def prompts_identity(source: PromptSource, chosen: Sequence[PromptAtEffort]) -> Identity:
    """Return the identity of chosen prompts."""
    return problems_identity(str(source.file) if source.file else names_of(source.environments or []), chosen)


def read_prompts(path: Path) -> list[Problem]:
    """Return the prompts of a file or folder, in its order; their answers are not known (empty).

    Raises:
        ValueError: The path is missing, or a row is not of the form (named by number).
    """
    path = require_input(path, "prompts")
    name = path.stem
    return [_problem(row, name, f"{path}:{number}") for number, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Return number (from 1; of a JSON lines file the line) and content of each row."""
    if path.is_dir():
        from datasets import Dataset, load_from_disk

        try:
            table = load_from_disk(str(path))
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} was not saved by datasets (save_to_disk). Give such a folder, or a file."
            ) from error
        if not isinstance(table, Dataset):
            raise ValueError(f"{path} holds the splits {list(table)}: name one, {path / next(iter(table))}.")
        yield from enumerate(table, 1)
    elif path.suffix == ".parquet":
        yield from enumerate(parquet.read_table(path).to_pylist(), 1)
    else:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parsed(line, f"{path}:{number}")


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}). Each line is {FORM}.") from error


def _problem(row: Any, name: str, where: str) -> Problem:
    if not isinstance(row, Mapping) or (row.get("messages") is None) == (row.get("prompt") is None):
        raise ValueError(f"{where}: {str(row)[:80]} is not of the form {FORM}.")
    prompt, environment = row.get("prompt"), row.get("environment") or name
    messages = row["messages"] if prompt is None else [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise ValueError(f"{where}: messages must be objects of two texts, role and content. A row is {FORM}.")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the last message is the assistant's; the parent is to write it. Take it out.")
    plain = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    return Problem(str(environment), plain, answer="")


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PromptAtEffort]) -> list[list[int]]:
    """Token ids of the rendered prompts."""
    texts = [render_prompt(tokenizer, problem, effort) for problem, effort in pairs]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def check_lengths(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PromptAtEffort], prompt_tokens: int) -> None:
    """Refuse prompts that leave no room for a completion, before anything is generated.

    A token is at least one byte: only prompts with more bytes than `prompt_tokens` are tokenized here.

    Raises:
        ValueError: A prompt is longer than `prompt_tokens`.
    """
    for problem, effort in pairs:
        if len(render_prompt(tokenizer, problem, effort).encode()) <= prompt_tokens:
            continue
        length = len(encode(tokenizer, [(problem, effort)])[0])
        if length > prompt_tokens:
            raise ValueError(
                f"The prompt {problem.text()[:60]!r}... has {length} tokens; context - max_new_tokens leaves "
                f"{prompt_tokens}. Take it out, or give a smaller max_new_tokens."
            )
