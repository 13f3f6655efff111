"""Parses completions in harmony, the response format of gpt-oss: messages in channels, of which `final` is the answer.

    <|channel|>analysis<|message|>THINKING<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>

A completion follows `<|start|>assistant` of the prompt. Each message has a header (channel, and for a tool call
the recipient `to=...`) and a text, and ends with `<|end|>`, `<|return|>` or `<|call|>`; `<|endoftext|>` ends a turn as
`<|return|>` does. The answer is the text of the last message if it is in the channel `final` and ends the turn.

`parse_text` reads harmony of any vocabulary, as the tiny models have. `parse_with_library` lets OpenAI's parser read
it, which knows the vocabulary of gpt-oss only. Time: linear in the text, whatever the text.

Reads: the vocabulary of `openai-harmony` (`load_vocabulary`). Writes: a temporary file of 4 MB for it.
Source: the harmony response format, https://github.com/openai/harmony.
"""

import base64
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_puzzle.environments.completion import ParsedCompletion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>")  # of every harmony vocabulary
GPT_OSS_TOKENS = {"<|return|>": 200_002, "<|channel|>": 200_005, "<|call|>": 200_012}  # places in that of gpt-oss
VOCABULARY_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"  # folder in which openai-harmony looks for its vocabulary
VOCABULARY_FILE = "o200k_base.tiktoken"
VOCABULARY_SIZE = 199_998  # lines of the file

START = "<|start|>assistant"
FINAL_HEADER, END = "<|channel|>final<|message|>", "<|return|>"
TURN_ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")
_END = re.compile(r"<\|(?:end|return|call|endoftext)\|>")
_CONTROL = re.compile(r"<\|(?:start|message|channel|constrain)\|>")


@dataclass(frozen=True)
class Message:
    """A message of a completion.

    Attributes:
        channel: its channel; empty if its header is not of the format.
        calls: whether it goes to a tool.
        text: its content.
    """

    channel: str
    calls: bool
    text: str


def judge(messages: Sequence[Message], end: str) -> ParsedCompletion:
    """Return what a completion consists of.

    Args:
        messages: its messages, those of the assistant.
        end: token that ended the last one; empty if none did.
    """
    thoughts = [message.text for message in messages if message.channel == "analysis"]
    analysis = "\n".join(thoughts) if thoughts else None
    last = messages[-1] if messages else Message("analysis", False, "")
    if any(not message.channel for message in messages):
        return ParsedCompletion(None, analysis, "malformed")
    if end == "<|call|>" or (end and last.calls):
        return ParsedCompletion(None, analysis, "tool_call")
    if end not in TURN_ENDS:
        return ParsedCompletion(None, analysis, "unfinished")
    if last.channel != "final" or not last.text.strip():
        return ParsedCompletion(None, analysis, "no_final")
    if _CONTROL.search(last.text):
        return ParsedCompletion(None, analysis, "malformed")
    return ParsedCompletion(last.text, analysis, "final")


def parse_text(completion: str) -> ParsedCompletion:
    """Parse a completion that was decoded with its special tokens; what follows the end of the turn does not count."""
    messages: list[Message] = []
    text, place, end = START + completion, 0, "<|end|>"  # the prompt ended with the beginning of the turn
    while end == "<|end|>" and place < len(text):
        header_end = text.find("<|message|>", place)
        found = _END.search(text, max(header_end, place))
        if header_end < 0 and not found:
            return judge(messages, "")  # cut off in a header
        body_end = found.start() if found else len(text)
        header = text[place:header_end] if header_end >= 0 else ""
        messages.append(Message(*_channel_and_recipient(header), text[header_end + len("<|message|>") : body_end]))
        if not messages[-1].channel:
            return judge(messages, "")
        place, end = (found.end(), found[0]) if found else (len(text), "")
    return judge(messages, end)


def _channel_and_recipient(header: str) -> tuple[str, bool]:
    """Return the channel of a header, empty if it is not of the format, and whether it names a recipient."""
    before, marked, after = header.removeprefix(START).partition("<|channel|>")
    after, _, kind = after.partition("<|constrain|>")
    words = after.split()
    recipient = before.split()
    well_formed = header.startswith(START) and marked and words and "<|" not in before + after + kind
    if before and not (before[0].isspace() and all(word.startswith("to=") for word in recipient)):
        well_formed = False
    return (words[0] if well_formed else ""), any(word.startswith("to=") for word in [*recipient, *words])


def has_library_vocabulary(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the control tokens of a tokenizer have the numbers that they have in gpt-oss."""
    return all(tokenizer.get_added_vocab().get(token) == number for token, number in GPT_OSS_TOKENS.items())


def parse_with_library(completion: str) -> ParsedCompletion:
    """Parse a completion by `openai-harmony`, with the vocabulary of gpt-oss; `load_vocabulary` comes first.

    Args:
        completion: text with special tokens.
    """
    from openai_harmony import HarmonyError, Role, StreamableParser, StreamState

    encoding = _encoding()
    ends = {encoding.encode(token, allowed_special="all")[0]: token for token in (*TURN_ENDS, "<|end|>")}
    parser, end = StreamableParser(encoding, Role.ASSISTANT, strict=True), ""
    try:
        for token in encoding.encode(completion, allowed_special="all"):
            end = ends.get(token, "")
            if end == "<|endoftext|>":  # the parser takes it for text
                if parser.state != StreamState.CONTENT:
                    return judge([*_messages(parser), Message("", False, "")], end)
                parser.process_eos()
                break
            parser.process(token)
            if end in TURN_ENDS:
                break
    except HarmonyError:
        return judge([*_messages(parser), Message("", False, "")], end)
    started = [Message(parser.current_channel, False, parser.current_content)] if parser.current_channel else []
    return judge(_messages(parser) + ([] if end else started), end)


def _messages(parser: Any) -> list[Message]:
    return [
        Message(
            message.channel if message.channel and message.author.role.value == "assistant" else "",
            # The parser takes the type of a final message (`final <|constrain|>json`) for its recipient.
            message.recipient is not None and not message.recipient.startswith("<|constrain|>"),
            "".join(content.text for content in message.content),
        )
        for message in parser.messages
    ]


@cache
def _encoding() -> Any:
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def load_vocabulary(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Load the vocabulary of `openai-harmony` without network: from its own folder, or from the tokenizer.

    The library wants the vocabulary as a file of its own, whose checksum it knows, and would download it. The tokenizer
    of a gpt-oss checkpoint has the same vocabulary, so the file is made from it.

    Args:
        tokenizer: of a gpt-oss checkpoint.

    Raises:
        ValueError: the package is not installed, or the tokenizer has another vocabulary.
    """
    if _encoding.cache_info().currsize:
        return
    try:
        from openai_harmony import HarmonyError
    except ImportError as error:
        raise ValueError(
            "Answers of gpt-oss are read by openai-harmony, which is not installed: pip install 'lit-puzzle[harmony]'."
        ) from error
    given = os.environ.get(VOCABULARY_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        if given is None:
            (Path(folder) / VOCABULARY_FILE).write_bytes(vocabulary_bytes(tokenizer))
            os.environ[VOCABULARY_VARIABLE] = folder
        try:
            _encoding()
        except HarmonyError as error:
            raise ValueError(
                f"openai-harmony cannot load its vocabulary from {given or tokenizer.name_or_path}: {error}. Give the "
                "tokenizer of a gpt-oss checkpoint."
            ) from error
        finally:
            if given is None:
                del os.environ[VOCABULARY_VARIABLE]


def vocabulary_bytes(tokenizer: "PreTrainedTokenizerBase") -> bytes:
    """Return the file of the vocabulary of a tokenizer: each token in base64 and its number, a line each."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    special = set(tokenizer.get_added_vocab())
    ranked = sorted((number, token) for token, number in tokenizer.get_vocab().items() if token not in special)
    lines = []
    for number, token in ranked[:VOCABULARY_SIZE]:
        encoded = base64.b64encode(bytes(byte_of[character] for character in token)).decode()
        lines.append(f"{encoded} {number}\n")
    return "".join(lines).encode()
