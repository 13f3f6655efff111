"""Renders chats by the template of a tokenizer, which is a program of the checkpoint's author.

transformers runs it in Jinja's sandbox: it cannot reach files or code, but it can fail or loop without end. Reads and
writes nothing. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_puzzle.run.library_calls import library_errors, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "chat_template.jinja"
TEMPLATE_SECONDS = 10.0


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **values: Any) -> str:
    """Return the text of a chat by the tokenizer's template, up to where the assistant's turn begins.

    Args:
        tokenizer: of the model.
        messages: turns, each with `role` and `content`.
        **values: what else the template takes, such as `reasoning_effort`.

    Raises:
        ValueError: the template is missing, fails, or takes more than ten seconds.
    """
    turns = [dict(message) for message in messages]
    place = f"the chat template of {Path(tokenizer.name_or_path)}"
    with time_limit(TEMPLATE_SECONDS, place), library_errors(place):
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **values))
