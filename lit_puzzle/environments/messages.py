"""Checks rows of files of problems and prompts: which keys they have, and messages for a chat template.

Nothing is dropped: a key that is not known is refused by its place, so is a role that is not one of `ROLES`. Further
keys of a message (`thinking`, `tool_calls`) stay in it; `lit_puzzle.environments.chat_template` refuses those that the
chat template does not take. A key with null counts as missing: Parquet has no other way to leave one out.

Reads and writes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_puzzle.environments.environment import INVISIBLE

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}
ROW = '{"prompt": text} or {"messages": [{"role": ..., "content": ...}]}, and optionally "tools": [...]'


def checked_row(row: Any, place: str, further: Sequence[str], form: str) -> dict[str, Any]:
    """Return a row without its null keys.

    Args:
        row: value of a line.
        place: where it stands, for messages.
        further: keys beside `prompt` or `messages` and `tools` that it may have.
        form: the form of a row, for messages.

    Raises:
        ValueError: it is no object, has neither a prompt nor messages or both, or a key that is not known.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: {str(row)[:80]!r} is not of the form {form}.")
    given = {key: value for key, value in row.items() if value is not None}
    if ("prompt" in given) == ("messages" in given):
        raise ValueError(f"{place}: a row has either prompt or messages, this one {sorted(given)}. The form is {form}.")
    if "reasoning_effort" in given:
        raise ValueError(
            f"{place}: reasoning_effort is given; efforts are set by the recipe (`efforts`). Take the key out, or "
            "divide the file by effort."
        )
    unknown = sorted(set(given) - {"prompt", "messages", "tools", *further})
    if unknown:
        raise ValueError(f"{place}: the keys {unknown} have no use. The form is {form}. Take them out.")
    return given


def checked_messages(row: Mapping[str, Any], place: str) -> tuple[dict[str, Any], ...]:
    """Return the messages of a row, up to the turn of the assistant.

    Args:
        row: from `checked_row`.
        place: where it stands, for messages.

    Raises:
        ValueError: messages of another form or role, an answer that is there already, or nothing that a user asks.
    """
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: messages must be a list of objects with role and content. The form is {ROW}.")
    checked = tuple(_checked_message(message, f"{place}: message {n}") for n, message in enumerate(messages, 1))
    if checked[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"{place}: the last message is the {checked[-1]['role']}'s; a model answers a user or a tool. Take it out."
        )
    asked = [message["content"] for message in checked if message["role"] == "user"]
    if not asked or not INVISIBLE.sub("", asked[-1]).strip():
        raise ValueError(f"{place}: the user asks nothing: the last user message is {'empty' if asked else 'missing'}.")
    return checked


def _checked_message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} must be an object of role and content, got {str(message)[:60]!r}.")
    given = {key: value for key, value in message.items() if value is not None}
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        known = OTHER_NAMES.get(str(role).lower(), str(role).lower())
        hint = f" Write {known!r}." if known in ROLES else ""
        raise ValueError(f"{place} has the role {role!r}; roles are {', '.join(ROLES)}.{hint}")
    if content is None and role == "assistant" and len(given) > 1:  # of tool calls only
        return given
    if not isinstance(content, str):
        raise ValueError(f"{place}: content must be a text, got {str(content)[:60]!r}.")
    return given


def checked_tools(row: Mapping[str, Any], place: str) -> tuple[dict[str, Any], ...]:
    """Return the definitions of tools of a row.

    Raises:
        ValueError: they are not a list of objects.
    """
    tools = row.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{place}: tools must be a list of objects, got {str(tools)[:60]!r}.")
    return tuple(dict(tool) for tool in tools)
