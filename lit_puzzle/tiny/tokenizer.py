r"""Tokenizer of the tiny world: whole words as tokens, a chat format like harmony, a Hugging Face tokenizer folder.

A token is a word together with the space or line break before it (`` q=``, ``\nvalue:``), so that decoding is plain
concatenation and text -> tokens -> text is the identity. `` q=``, `` q:`` and ``q`` are three tokens: a small model
learns to retrieve definitions quickly only if the word that it looks up is one token.

Chat template: the system message contains ``Reasoning: low|medium|high`` (`reasoning_effort`, medium by default); an
assistant message may have its analysis as `thinking`.

Reads and writes nothing (`save_pretrained` of the result writes a folder). Source: the harmony format of gpt-oss.
"""

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_puzzle.tiny.world import LETTERS

PAD, START, END, MESSAGE, CHANNEL, RETURN, CALL, UNKNOWN = (
    "<|endoftext|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|call|>",
    "<|unknown|>",
)
SPECIAL_TOKENS = (PAD, START, END, MESSAGE, CHANNEL, RETURN, CALL, UNKNOWN)
WORDS = (
    *("system", "user", "assistant", "analysis", "final", "Reasoning:", " low", " medium", " high"),
    *("chains", "sorting", "counting", "\nvalue:", "\norder:", "\nabove:", "?", ",", " |", ">", "<", "+1", "+2", "+3"),
    *"0123456789",
    *LETTERS,
    *(f" {letter}=" for letter in LETTERS),
    *(f" {letter}:" for letter in LETTERS),
)

CHAT_TEMPLATE = """\
{%- set effort = reasoning_effort if reasoning_effort is defined and reasoning_effort else 'medium' -%}
{%- if effort not in ['low', 'medium', 'high'] -%}
{{- raise_exception('reasoning_effort is low, medium or high, not ' ~ effort) -}}
{%- endif -%}
{{- '<|start|>system<|message|>Reasoning: ' ~ effort -}}
{%- for message in messages if message.role == 'system' -%}{{- message.content -}}{%- endfor -%}
{{- '<|end|>' -}}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'user' -%}
{{- '<|start|>user<|message|>' ~ message.content ~ '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|start|>assistant' -}}
{%- if message.thinking is defined and message.thinking -%}
{{- '<|channel|>analysis<|message|>' ~ message.thinking ~ '<|end|><|start|>assistant' -}}
{%- endif -%}
{{- '<|channel|>final<|message|>' ~ message.content ~ '<|return|>' -}}
{%- else -%}
{{- raise_exception('message roles are system, user and assistant, not ' ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the lists above; token ids are always the same."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL_TOKENS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(WORDS, key=len, reverse=True)
    pattern = "|".join(re.escape(word).replace(r"\ ", " ").replace("\\\n", "\n") for word in longest_first)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=RETURN,
        unk_token=UNKNOWN,
        additional_special_tokens=[START, END, MESSAGE, CHANNEL, CALL],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=131072,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
