"""Renders prompts of problems by a tokenizer's chat template, and refuses what would not arrive at the model.

  control tokens  a message that contains the text of one is refused: it would be read as one;
  efforts         levels of effort of a template that has none are refused, and so is no effort where it has levels;
  dropped parts   a message, or a key of one, that changes nothing in the text is refused: templates skip roles and keys
                  that they do not know without a word.

Time, memory and the date of the run: `lit_puzzle.model.chat`. Reads and writes nothing.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lit_puzzle.environments.environment import EFFORTS, NO_EFFORT, PLAIN_KEYS, Problem
from lit_puzzle.model.chat import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TELLING_CHARACTERS = 16  # a shorter text may be part of the prompt by chance
_HELLO = [{"role": "user", "content": "Hello"}]

_has_efforts: "WeakKeyDictionary[PreTrainedTokenizerBase, bool]" = WeakKeyDictionary()


def has_efforts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the chat template of a tokenizer makes other prompts at other levels of reasoning effort."""
    if tokenizer not in _has_efforts:
        prompts = {render_chat(tokenizer, _HELLO, reasoning_effort=effort) for effort in EFFORTS}
        _has_efforts[tokenizer] = len(prompts) > 1
    return _has_efforts[tokenizer]


def render_prompt(tokenizer: "PreTrainedTokenizerBase", problem: Problem, effort: str) -> str:
    """Return the text of a prompt by the tokenizer's chat template, up to where the assistant's turn begins.

    Args:
        tokenizer: of the model.
        problem: whose messages are rendered.
        effort: low, medium or high; `none` if the chat template takes no `reasoning_effort`.

    Raises:
        ValueError: no chat template, one that fails, does not end, drops a part of the problem or has no
            levels of effort, or a problem that contains a control token; the message says where the problem stands.
    """
    _check_control_tokens(tokenizer, problem)
    try:
        _check_effort(tokenizer, effort)
        text = _render(tokenizer, problem.messages, problem.tools, effort)
    except ValueError as error:
        raise ValueError(f"{problem.place()}: {error}") from error
    for what, part, messages, tools in _parts(problem, _shown(tokenizer, problem, effort)):
        if len(part) >= TELLING_CHARACTERS and part in text:
            continue
        if _unchanged(tokenizer, messages, tools, effort, text):
            raise ValueError(
                f"{problem.place()}: the chat template drops {what}, which changes nothing in the prompt. Take it out, "
                "or give a tokenizer whose template takes it."
            )
    return text


def _shown(tokenizer: "PreTrainedTokenizerBase", problem: Problem, effort: str) -> set[int]:
    """Return the messages whose contents appear in the prompt: all of them are marked, and rendered once."""
    marks = {place: f"\nmore {place} more" for place, message in enumerate(problem.messages) if message.get("content")}
    messages = [
        {**message, "content": message["content"] + marks[place]} if place in marks else message
        for place, message in enumerate(problem.messages)
    ]
    try:
        text = _render(tokenizer, messages, problem.tools, effort)
    except ValueError:  # the template refuses one of the marks: each message is looked at by itself
        return set()
    return {place for place, mark in marks.items() if mark.strip() in text}


def _unchanged(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    effort: str,
    text: str,
) -> bool:
    """Return whether other messages or tools give the same text."""
    try:
        return _render(tokenizer, messages, tools, effort) == text
    except ValueError:  # the template wants the part
        return False


def _parts(
    problem: Problem, shown: Collection[int]
) -> Iterator[tuple[str, str, list[dict[str, Any]], Sequence[dict[str, Any]]]]:
    """Yield each part of a problem: its name, its text if it is one, and messages and tools with another or none.

    Args:
        problem: the problem.
        shown: messages whose contents need no look.
    """
    messages = [dict(message) for message in problem.messages]
    for place, message in enumerate(messages):
        before, after = messages[:place], messages[place + 1 :]
        content = message.get("content", "").strip()
        if content and place not in shown:
            other = message | {"content": f"{content}\nmore"}
            yield f"message {place + 1} ({message['role']})", content, [*before, other, *after], problem.tools
        for key in message:
            if key not in PLAIN_KEYS:
                less = {name: part for name, part in message.items() if name != key}
                yield f"{key!r} of message {place + 1}", "", [*before, less, *after], problem.tools
    if problem.tools:
        yield "the tools", "", messages, ()


def _check_effort(tokenizer: "PreTrainedTokenizerBase", effort: str) -> None:
    leveled = has_efforts(tokenizer)
    if effort != NO_EFFORT and not leveled:
        raise ValueError(
            f"effort {effort} was given, but the chat template of {tokenizer.name_or_path} takes no reasoning_effort: "
            f"all efforts would give the same prompts. Set efforts to {NO_EFFORT!r}."
        )
    if effort == NO_EFFORT and leveled:
        raise ValueError(
            f"effort {NO_EFFORT} was given, but the chat template of {tokenizer.name_or_path} has levels of effort. "
            f"Set efforts to some of {', '.join(EFFORTS)}."
        )


def _check_control_tokens(tokenizer: "PreTrainedTokenizerBase", problem: Problem) -> None:
    known = tokenizer.added_tokens_decoder.values()
    control = {token.content for token in known if token.special} | set(tokenizer.all_special_tokens)
    for text in _texts([problem.messages, problem.tools]):
        found = next((token for token in sorted(control) if token and token in text), None)
        if found is not None:
            raise ValueError(
                f"{problem.place()}: the text contains {found!r}, which is a control token of this tokenizer. Take it "
                "out, or write it in another way."
            )


def _texts(value: Any) -> Iterator[str]:
    """Yield every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    effort: str,
) -> str:
    level = {} if effort == NO_EFFORT else {"reasoning_effort": effort}
    return render_chat(tokenizer, messages, tools=list(tools) or None, **level)
