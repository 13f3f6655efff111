"""The format of a model's completions: where thinking and final answer stand, and how a completion ends.

    harmony   messages in channels, as gpt-oss writes them            `lit_puzzle.environments.harmony`
    think     <think>THINKING</think>ANSWER<end of text>              an opening tag may stand in the prompt
    plain     ANSWER<end of text>                                     no thinking is told apart
    whole     everything, control tokens included, finished or not    for graders that read completions themselves

The format follows from the tokenizer (`answer_format`): harmony where its control tokens are in the vocabulary, think
where vocabulary or chat template have the tag, plain otherwise. A recipe may name another one (`fix_format`).

Reads and writes nothing. Time: linear in the text, whatever the text.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from lit_puzzle.environments import harmony
from lit_puzzle.environments.completion import ParsedCompletion, Status

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FormatName = Literal["harmony", "think", "plain", "whole"]
FormatChoice = Literal["auto", "harmony", "think", "plain", "whole"]
THINK, THOUGHT = "<think>", "</think>"

_formats: "WeakKeyDictionary[PreTrainedTokenizerBase, AnswerFormat]" = WeakKeyDictionary()


@dataclass(frozen=True)
class AnswerFormat:
    """A format of completions.

    Attributes:
        name: harmony, think, plain or whole.
        end: token that ends a completion.
        control: tokens that no answer contains.
        library: whether `openai-harmony` parses; harmony with the vocabulary of gpt-oss.
        thinking_in_prompt: whether the prompt ends with the opening tag; think only.
    """

    name: FormatName
    end: str
    control: tuple[str, ...] = ()
    library: bool = False
    thinking_in_prompt: bool = False

    @property
    def thinks(self) -> bool:
        """Whether thinking stands apart from the answer."""
        return self.name in ("harmony", "think")

    @property
    def header(self) -> str:
        """Text before the answer where nothing is thought."""
        if self.name == "harmony":
            return harmony.FINAL_HEADER
        if self.name == "think":
            return f"{'' if self.thinking_in_prompt else THINK}\n{THOUGHT}\n\n"
        return ""

    def wrap(self, answer: str) -> str:
        """Return a finished completion with this answer and no thinking."""
        return f"{self.header}{answer}{self.end}"

    def parse(self, completion: str) -> ParsedCompletion:
        """Return what a completion consists of.

        Args:
            completion: text decoded with its special tokens.
        """
        if self.name == "whole":
            return ParsedCompletion(completion, None, "final")
        if self.name == "harmony":
            return harmony.parse_with_library(completion) if self.library else harmony.parse_text(completion)
        body, status = self._ended(completion)
        if self.name == "plain":
            return _finished(body, None, status)
        before, tag, after = body.partition(THOUGHT)
        opened = self.thinking_in_prompt or body.lstrip().startswith(THINK)
        if not tag and opened:
            return ParsedCompletion(None, _analysis(body), "no_final" if status == "final" else status)
        return _finished(after, _analysis(before), status) if tag else _finished(body, None, status)

    def _ended(self, completion: str) -> tuple[str, Status]:
        """Return the text before the first control token, and whether that ends the completion.

        Generation stops at each end token of the checkpoint, of which the tokenizer names one: a control token with
        nothing but control tokens behind it ended the completion.
        """
        either = "|".join(re.escape(token) for token in sorted({self.end, *self.control}, key=len, reverse=True))
        body, *rest = re.split(f"({either})", completion)
        if not rest:
            return body, "unfinished"
        behind = "".join(rest[1::2])
        return body, "final" if rest[0] == self.end or not behind.strip() else "malformed"


def _analysis(text: str) -> str | None:
    return text.strip().removeprefix(THINK).strip() or None


def _finished(text: str, analysis: str | None, status: Status) -> ParsedCompletion:
    """Return a completion whose answer is this text, if it ended and the answer is not empty."""
    if status == "final" and not text.strip():
        status = "no_final"
    return ParsedCompletion(text.strip() if status == "final" else None, analysis, status)


def answer_format(tokenizer: "PreTrainedTokenizerBase") -> AnswerFormat:
    """Return the format of the completions of a model: the one that was fixed, or what the tokenizer says.

    Args:
        tokenizer: of the model.

    Raises:
        ValueError: see `fix_format`.
    """
    if tokenizer not in _formats:
        fix_format(tokenizer, "auto")
    return _formats[tokenizer]


def fix_format(tokenizer: "PreTrainedTokenizerBase", choice: FormatChoice) -> None:
    """Choose the format of the completions of a model.

    Args:
        tokenizer: of the model, as it was loaded; a copy of it has the format that the tokenizer says.
        choice: the format; `auto` takes what the tokenizer says.

    Raises:
        ValueError: harmony of a tokenizer without its control tokens, a tokenizer without end token, or a gpt-oss
            vocabulary that cannot be loaded.
    """
    _formats[tokenizer] = _format_of(tokenizer, choice)


def _format_of(tokenizer: "PreTrainedTokenizerBase", choice: FormatChoice) -> AnswerFormat:
    added = tokenizer.get_added_vocab()
    missing = [token for token in harmony.CONTROL_TOKENS if token not in added]
    if choice == "harmony" or (choice == "auto" and not missing):
        if missing:
            raise ValueError(
                f"answer_format: harmony was given, but {tokenizer.name_or_path} has no token {missing[0]}. Set "
                "answer_format: auto."
            )
        library = harmony.has_library_vocabulary(tokenizer)
        if library:
            harmony.load_vocabulary(tokenizer)
        return AnswerFormat("harmony", harmony.END, library=library)
    end = tokenizer.eos_token
    if choice == "whole":
        return AnswerFormat("whole", str(end or ""))
    if not end:
        raise ValueError(f"{tokenizer.name_or_path} names no end token. Set eos_token in tokenizer_config.json.")
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    control = tuple(sorted(special - {THINK, THOUGHT}))
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if choice == "plain" or (choice == "auto" and THOUGHT not in added and THINK not in template):
        return AnswerFormat("plain", str(end), control)
    return AnswerFormat("think", str(end), control, thinking_in_prompt=_opens_thinking(tokenizer))


def _opens_thinking(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the prompt of a chat ends with the opening tag of the thinking."""
    from lit_puzzle.model.chat import render_chat

    return render_chat(tokenizer, [{"role": "user", "content": "?"}]).rstrip().endswith(THINK)
