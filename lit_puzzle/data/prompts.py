"""Prompts: problems of environments, or messages of yours from a file, each at its own reasoning effort.

Reads prompts as JSON lines, Parquet, a folder of Parquet shards, or a folder that Hugging Face `datasets` saved
(`lit_puzzle.environments.row_files`); each row has `messages` ([{"role": text, "content": text}, ...], without the
answer) or `prompt` (text of the user), and may have `tools` and `environment` (a name for the counts). Other keys are
refused. Writes nothing.

Training and evaluation never meet here either: the eighth of all problems that is held out, which
`lit_puzzle.environments.environment.is_held_out` decides by what they ask, is never a prompt, whatever the file.

Memory: all prompts as text.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import EFFORTS, Problem, PromptAtEffort, draw, effort_weights, is_held_out
from lit_puzzle.environments.messages import ROW, checked_messages, checked_row, checked_tools
from lit_puzzle.environments.problem_identity import names_of, problems_identity
from lit_puzzle.environments.row_files import read_rows
from lit_puzzle.model.opening import load_config
from lit_puzzle.model.tokens import token_ids
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity

FORM = f'{ROW} and "environment": text'


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
        ValueError: The path is missing or cannot be read, or a row is not of the form (named by file and number).
    """
    path = require_input(path, "prompts")
    name = path.name.partition(".")[0]
    problems = []
    for place, value in read_rows(path):
        row = checked_row(value, place, ["environment"], FORM)
        environment = row.get("environment", name)
        if not isinstance(environment, str):
            raise ValueError(f"{place}: environment must be a text, got {str(environment)[:60]!r}.")
        problems.append(Problem(environment, checked_messages(row, place), "", checked_tools(row, place), place))
    return problems


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PromptAtEffort]) -> list[list[int]]:
    """Token ids of the rendered prompts."""
    texts = [render_prompt(tokenizer, problem, effort) for problem, effort in pairs]
    return [token_ids(tokenizer, text) for text in texts]


def check_lengths(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PromptAtEffort],
    checkpoint: Path,
    max_new_tokens: int,
    context_tokens: int | None = None,
) -> None:
    """Render all prompts and refuse those that leave no room for a completion, before anything is generated.

    A token is at least one byte: only prompts with more bytes than there is room for tokens are tokenized here.

    Args:
        tokenizer: of the model.
        pairs: problems at their efforts.
        checkpoint: folder of the model, whose configuration says what it can read.
        max_new_tokens: cap on the tokens of a completion.
        context_tokens: what an engine reads, where that is less than the model can.

    Raises:
        ValueError: A prompt that cannot be rendered, or with more than context - `max_new_tokens` tokens.
    """
    prompt_tokens = (context_tokens or int(load_config(checkpoint).max_position_embeddings)) - max_new_tokens
    for problem, effort in pairs:
        text = render_prompt(tokenizer, problem, effort)
        if len(text.encode()) <= prompt_tokens:
            continue
        length = len(token_ids(tokenizer, text))
        if length > prompt_tokens:
            raise ValueError(
                f"{problem.place()}: the prompt has {length} tokens; context - max_new_tokens leaves {prompt_tokens}. "
                "Take it out, or give a smaller max_new_tokens."
            )
