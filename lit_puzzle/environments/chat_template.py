"""Renders prompts by a tokenizer's chat template: the one place where messages become text.

A chat template is a program in the checkpoint's folder, and messages come from files. Hence, for every prompt:
  time and memory  templates run in a process of their own (`lit_puzzle.environments.template_worker`), which is ended when
                   a prompt takes too long;
  date             a template that reads the clock (gpt-oss's does) is given the date that the run has recorded, so that
                   resumed and compared runs have the same prompts: load tokenizers with `load_tokenizer`;
  control tokens   a message that contains the text of one (`<|start|>`) is refused: it would be read as one;
  dropped parts    a message, or a key of one, that changes nothing in the text is refused: templates skip roles and keys
                   that they do not know without a word.

Reads a checkpoint folder's tokenizer; writes nothing. Memory: a process of 30 MB.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lit_puzzle.environments import template_worker
from lit_puzzle.environments.environment import PLAIN_KEYS, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Dates = WeakKeyDictionary[PreTrainedTokenizerBase, str]

START_SECONDS = 60.0
REPLY_SECONDS = 60.0  # of wall clock; a template that computes is ended by its CPU time before
TELLING_CHARACTERS = 16  # a shorter text may be part of the prompt by chance

_dates: "Dates" = WeakKeyDictionary()
_workers: dict[int, "_Worker"] = {}  # of each process, so that a forked one starts its own


def load_tokenizer(checkpoint: Path, date: str, **options: Any) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint folder, whose chat template is given the date of the run.

    Args:
        checkpoint: folder with the tokenizer.
        date: ISO date, `lit_puzzle.run.inputs.run_date` of the run.
        **options: of `AutoTokenizer.from_pretrained`.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint, **options)
    fix_date(tokenizer, date)
    return tokenizer


def fix_date(tokenizer: "PreTrainedTokenizerBase", date: str) -> None:
    """Set the date that the chat template of a loaded tokenizer is given, as an ISO text."""
    _dates[tokenizer] = date


def render_prompt(tokenizer: "PreTrainedTokenizerBase", problem: Problem, effort: str) -> str:
    """Return the text of a prompt by the tokenizer's chat template, up to where the assistant's turn begins.

    Args:
        tokenizer: of the model; its chat template takes `reasoning_effort`.
        problem: whose messages are rendered.
        effort: low, medium or high.

    Raises:
        ValueError: no chat template, one that fails, does not end or drops a part of the problem, or a problem that
            contains a control token; the message says where the problem stands.
    """
    _check_control_tokens(tokenizer, problem)
    try:
        text = _render(tokenizer, problem.messages, problem.tools, effort)
    except ValueError as error:
        raise ValueError(f"{problem.place()}: {error}") from error
    for what, part, messages, tools in _parts(problem):
        if len(part) >= TELLING_CHARACTERS and part in text:
            continue
        if _unchanged(tokenizer, messages, tools, effort, text):
            raise ValueError(
                f"{problem.place()}: the chat template drops {what}, which changes nothing in the prompt. Take it out, "
                "or give a tokenizer whose template takes it."
            )
    return text


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


def _parts(problem: Problem) -> Iterator[tuple[str, str, list[dict[str, Any]], Sequence[dict[str, Any]]]]:
    """Yield each part of a problem: its name, its text if it is one, and messages and tools with another or none."""
    messages = [dict(message) for message in problem.messages]
    for place, message in enumerate(messages):
        before, after = messages[:place], messages[place + 1 :]
        content = message.get("content", "").strip()
        if content:
            other = message | {"content": f"{content}\nmore"}
            yield f"message {place + 1} ({message['role']})", content, [*before, other, *after], problem.tools
        for key in message:
            if key not in PLAIN_KEYS:
                less = {name: part for name, part in message.items() if name != key}
                yield f"{key!r} of message {place + 1}", "", [*before, less, *after], problem.tools
    if problem.tools:
        yield "the tools", "", messages, ()


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
    given = list(tools) or None
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template. Add chat_template.jinja to its folder.")
    variables = {
        **tokenizer.special_tokens_map,
        "messages": list(messages),
        "tools": given,
        "documents": None,
        "add_generation_prompt": True,
        "reasoning_effort": effort,
    }
    return _worker().render(tokenizer.get_chat_template(tools=given), variables, _dates.get(tokenizer))


def _worker() -> "_Worker":
    """Return this process's worker, starting one if there is none."""
    if os.getpid() not in _workers:
        _workers[os.getpid()] = _Worker()
    return _workers[os.getpid()]


class _Worker:
    """The process that renders."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: dict[str, int] = {}  # number of each template that the process has compiled
        self._connection, other = Pipe()
        # -P: the folder of the file, which Python would search first, has modules of its own.
        command = [sys.executable, "-P", str(Path(template_worker.__file__)), str(other.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)
        other.close()
        self._owner = os.getpid()
        atexit.register(self.close)
        self._receive(START_SECONDS)

    def render(self, template: str, variables: Mapping[str, Any], date: str | None) -> str:
        """Return the text of a prompt.

        Raises:
            ValueError: the template fails, or needs too much time or memory.
        """
        with self._lock:
            request: dict[str, Any] = {"variables": variables, "date": date}
            if template not in self._known:
                self._known[template] = len(self._known)
                request["source"] = template
            request["template"] = self._known[template]
            self._connection.send_bytes(json.dumps(request).encode())
            reply = self._receive(REPLY_SECONDS)
        if "error" in reply:
            raise ValueError(f"the chat template cannot be rendered: {reply['error']}")
        return str(reply["text"])

    def _receive(self, seconds: float) -> dict[str, str]:
        try:
            if self._connection.poll(seconds):
                reply: dict[str, str] = json.loads(self._connection.recv_bytes())
                return reply
            ended = f"did not end within {seconds:.0f} seconds"
        except (EOFError, OSError):
            code = self._process.wait()
            timed_out = code == -signal.SIGXCPU
            ended = f"did not end within {template_worker.CPU_SECONDS} seconds" if timed_out else f"ended with {code}"
        self.close()
        _workers.pop(self._owner, None)
        raise ValueError(f"the chat template cannot be rendered: its process {ended}. Give a tokenizer with another.")

    def close(self) -> None:
        """End the process; in a forked process, which has started none, nothing."""
        if os.getpid() == self._owner:
            self._connection.close()
            self._process.kill()
            self._process.wait()
