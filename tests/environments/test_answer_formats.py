"""answer_formats.py: each format by hand, the format that a tokenizer has, and what a recipe may choose instead."""

import pickle
import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lit_puzzle.environments.answer_formats import AnswerFormat, answer_format, fix_format
from lit_puzzle.environments.completion import ParsedCompletion
from lit_puzzle.tiny.tokenizer import build_tokenizer

CONTROL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
PLAIN = AnswerFormat("plain", "<|im_end|>", CONTROL)
THINK = AnswerFormat("think", "<|im_end|>", CONTROL)
OPENED = AnswerFormat("think", "<|im_end|>", CONTROL, thinking_in_prompt=True)
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant\n"


def chatml(template: str = CHAT, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    built = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", name_or_path="chatml")
    built.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>", *extra]})
    built.chat_template = template
    return built


@pytest.mark.parametrize(
    ("form", "completion", "parsed"),
    [
        (PLAIN, " It is 7.\n<|im_end|>", ParsedCompletion("It is 7.", None, "final")),
        (PLAIN, "7<|im_end|><|im_end|><|endoftext|>", ParsedCompletion("7", None, "final")),
        (PLAIN, "7<|endoftext|>", ParsedCompletion("7", None, "final")),  # another end token of the checkpoint
        (PLAIN, "7<|endoftext|>8", ParsedCompletion(None, None, "malformed")),
        (PLAIN, "7<|im_start|>user\n8<|im_end|>", ParsedCompletion(None, None, "malformed")),
        (PLAIN, "7", ParsedCompletion(None, None, "unfinished")),
        (PLAIN, "", ParsedCompletion(None, None, "unfinished")),
        (PLAIN, " <|im_end|>", ParsedCompletion(None, None, "no_final")),
        (PLAIN, "<think>so</think>7<|im_end|>", ParsedCompletion("<think>so</think>7", None, "final")),
        (THINK, "<think>\nso\n</think>\n\n7<|im_end|>", ParsedCompletion("7", "so", "final")),
        (THINK, "<think>\n\n</think>\n\n7<|im_end|>", ParsedCompletion("7", None, "final")),
        (THINK, "<think>so</think>7", ParsedCompletion(None, "so", "unfinished")),
        (THINK, "<think>so</think><|im_end|>", ParsedCompletion(None, "so", "no_final")),
        (THINK, "<think>so it is 7<|im_end|>", ParsedCompletion(None, "so it is 7", "no_final")),
        (THINK, "<think>so it is 7", ParsedCompletion(None, "so it is 7", "unfinished")),
        (THINK, "7<|im_end|>", ParsedCompletion("7", None, "final")),  # no thinking: seen, and graded
        (THINK, "so</think>7<|im_end|>", ParsedCompletion("7", "so", "final")),
        (OPENED, "so</think>7<|im_end|>", ParsedCompletion("7", "so", "final")),
        (OPENED, "so it is 7<|im_end|>", ParsedCompletion(None, "so it is 7", "no_final")),
        (AnswerFormat("whole", ""), "<|channel|>7", ParsedCompletion("<|channel|>7", None, "final")),
    ],
)
def test_formats_by_hand(form: AnswerFormat, completion: str, parsed: ParsedCompletion) -> None:
    assert form.parse(completion) == parsed
    assert pickle.loads(pickle.dumps(form)).parse(completion) == parsed


@pytest.mark.parametrize("form", [PLAIN, THINK, OPENED, AnswerFormat("harmony", "<|return|>")])
def test_a_wrapped_answer_is_found(form: AnswerFormat) -> None:
    assert form.parse(form.wrap("7 or 8")) == ParsedCompletion("7 or 8", None, "final")


def test_the_format_follows_from_the_tokenizer() -> None:
    assert answer_format(build_tokenizer()) == AnswerFormat("harmony", "<|return|>")
    plain = answer_format(chatml())
    assert (plain.name, plain.end, plain.thinks) == ("plain", "<|im_end|>", False)
    assert set(plain.control) == set(CONTROL)
    tagged = answer_format(chatml(extra=("<think>", "</think>")))
    assert tagged.name == "think" and not tagged.thinking_in_prompt and "</think>" not in tagged.control
    opened = answer_format(chatml(CHAT + "<think>\n"))
    assert opened.name == "think" and opened.thinking_in_prompt


def test_a_recipe_may_choose_another_one() -> None:
    tokenizer = chatml()
    for choice in ("think", "whole", "plain"):
        fix_format(tokenizer, choice)
        assert answer_format(tokenizer).name == choice
    fix_format(tokenizer, "auto")
    assert answer_format(tokenizer).name == "plain"
    with pytest.raises(ValueError, match="answer_format: harmony was given, but chatml has no token"):
        fix_format(tokenizer, "harmony")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="chatml names no end token"):
        fix_format(tokenizer, "auto")


def test_status_and_final_text_belong_together() -> None:
    for final, status in ((None, "final"), ("7", "unfinished")):
        with pytest.raises(ValueError, match="if, and only if"):
            ParsedCompletion(final, None, status)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["<think>" * 30_000, "</think>" * 30_000, "<|im" * 50_000, "<|endoftext|>" * 20_000])
def test_no_text_takes_long(text: str) -> None:
    begun = time.process_time()
    for form in (PLAIN, THINK, OPENED):
        form.parse(text)
        form.parse(text + "<|im_end|>")
    assert time.process_time() - begun < 2
