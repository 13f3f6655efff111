"""Reads sequences of a JSON lines file: `{"input_ids": [...]}` or `{"text": "..."}`, one a line.

A line may have `prompt_tokens` (how many of its tokens the parent was given), `environment` and `effort`. Texts are
tokenized as they stand, without special tokens. Memory: one line. Writes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_puzzle.model.opening import load_config, load_tokenizer
from lit_puzzle.model.tokens import token_ids
from lit_puzzle.run.json_lines import read_json_lines


def sequences_of(file: Path, parent: Path) -> Iterator[tuple[list[int], int]]:
    """Yield token ids and prompt tokens of each line, as the parent can read them.

    Args:
        file: JSON lines.
        parent: checkpoint folder: its tokenizer, its vocabulary, its context.

    Raises:
        ValueError: the file cannot be read, a line is not of either form, a prompt is not shorter than its sequence,
            the parent cannot read a sequence, or there is none.
    """
    config, tokenizer, number = load_config(parent), _Tokenizer(parent), 0
    limits = int(config.vocab_size), int(config.max_position_embeddings)
    for number, (place, value) in enumerate(read_json_lines(file), 1):
        row = _checked(value, place)
        ids = tokenizer(row) if isinstance(row, str) else row
        prompt = _prompt_tokens(value, place)
        if ids and not 0 <= prompt < len(ids):
            raise ValueError(
                f"{place}: the sequence has {len(ids)} tokens, prompt_tokens is {prompt}; it must be below that."
            )
        _check_readable(ids, f"{file}: sequence {number}", *limits)
        yield ids, prompt
    if not number:
        raise ValueError(f'{file} holds no sequence. Give one {{"input_ids": [...]}} or {{"text": "..."}} per line.')


class _Tokenizer:
    """Tokenizes texts; loads the tokenizer for the first."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self.loaded: PreTrainedTokenizerBase | None = None

    def __call__(self, text: str) -> list[int]:
        self.loaded = self.loaded or load_tokenizer(self.parent)
        return token_ids(self.loaded, text)


def _prompt_tokens(data: Mapping[str, Any], place: str) -> int:
    length = data.get("prompt_tokens", 0)
    if type(length) is not int:
        raise ValueError(f"{place}: prompt_tokens must be a whole number, got {length!r}.")
    return length


def _checked(data: Any, place: str) -> list[int] | str:
    form = 'one JSON object per line, {"input_ids": [1, 2, ...]} or {"text": "..."}'
    if not isinstance(data, Mapping) or ("input_ids" in data) == ("text" in data):
        raise ValueError(f"{place}: {str(data)[:80]!r} is not of the form {form}.")
    unknown = sorted(set(data) - {"input_ids", "text", "prompt_tokens", "environment", "effort"})
    if unknown:
        raise ValueError(f"{place}: the keys {unknown} have no use; the form is {form}. Take them out.")
    if "text" in data:
        if not isinstance(data["text"], str) or not data["text"]:
            raise ValueError(f"{place}: text must be a non-empty text, got {data['text']!r}.")
        return data["text"]
    ids = data["input_ids"]
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise ValueError(f"{place}: input_ids must be a non-empty list of whole numbers, got {str(ids)[:80]}.")
    return ids


def _check_readable(row: Sequence[int], name: str, vocab_size: int, context_tokens: int) -> None:
    if len(row) > context_tokens:
        raise ValueError(f"{name} has {len(row)} tokens; the parent's context holds {context_tokens}. Cut it.")
    if not row or min(row) < 0 or max(row) >= vocab_size:
        span = f"{min(row)}..{max(row)}" if row else "no tokens"
        raise ValueError(
            f"{name} has token ids {span}; the parent knows 0..{vocab_size - 1}. "
            "Tokenize it with the parent's own tokenizer."
        )
