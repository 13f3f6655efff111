"""The tiny parent before training: a stock GptOssForCausalLM whose random weights are set up to learn fast.

What makes two million parameters learn to reason in minutes, besides the lessons: embeddings larger than what the
first layers add (else layer 1 cannot see which token it stands on), and windowed layers that look a fixed number of
tokens back from the start: with rotary embeddings constant query and key biases are a function of distance alone. And
the three tokens of a letter begin alike, so that a match found for one holds for all.

Reads nothing; `save_parent` writes a Hugging Face folder. Source: this project's own.
Shapes: V vocabulary, C channels, H heads, D head dimension, P rotary pairs.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM

from lit_puzzle.tiny.tokenizer import CALL, build_tokenizer
from lit_puzzle.tiny.world import LETTERS

POSITIONAL_PAIRS = 4  # rotary pairs, highest frequencies first, that carry the positional biases


@dataclass(frozen=True)
class ParentShape:
    """Sizes of the parent, by the names of GptOssConfig; every other layer has the window, beginning with the first."""

    num_hidden_layers: int = 6
    hidden_size: int = 96
    intermediate_size: int = 64
    num_local_experts: int = 16
    num_experts_per_tok: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    sliding_window: int = 16
    vocab_size: int = 128
    max_position_embeddings: int = 131072


@dataclass(frozen=True)
class Initialization:
    """Where training starts.

    Attributes:
        matrix_std: standard deviation of all matrices but the embedding.
        embedding_std: standard deviation of the embedding.
        letter_share: correlation, at the start, of the vectors (embedding and head) of the tokens of one letter.
        looks_back: tokens that heads of windowed layers look back, head by head, repeated.
        positional_bias: size of the biases that make them look there; 0 for none.
    """

    matrix_std: float = 0.05
    embedding_std: float = 1.0
    letter_share: float = 0.8
    looks_back: tuple[int, ...] = (1, 2, 3, 4)
    positional_bias: float = 5.0


def build_parent(shape: ParentShape, initialization: Initialization) -> GptOssForCausalLM:
    """A stock gpt-oss with random weights, as `initialization` says; experts run by grouped matrix products."""
    tokenizer = build_tokenizer()
    if len(tokenizer) > shape.vocab_size:
        raise ValueError(f"vocab_size {shape.vocab_size} is too small: the tokenizer has {len(tokenizer)} tokens.")
    config = GptOssConfig(
        **asdict(shape),
        initializer_range=initialization.matrix_std,
        router_aux_loss_coef=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
        experts_implementation="grouped_mm",
    )
    model = GptOssForCausalLM(config)
    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(CALL)]
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(initialization.embedding_std / initialization.matrix_std)
        for matrix_VC in (model.model.embed_tokens.weight, model.lm_head.weight):
            relate_letters(matrix_VC, tokenizer.get_vocab(), initialization.letter_share)
        set_positional_biases(model, initialization)
    return model


def relate_letters(matrix_VC: Tensor, vocabulary: dict[str, int], share: float) -> None:
    """Makes the rows of `` q=`` and `` q:`` share * row(`q`) + sqrt(1 - share^2) * their own, of unchanged variance."""
    for letter in LETTERS:
        for form in (f" {letter}=", f" {letter}:"):
            own_C = matrix_VC[vocabulary[form]]
            matrix_VC[vocabulary[form]] = share * matrix_VC[vocabulary[letter]] + math.sqrt(1.0 - share**2) * own_C


def set_positional_biases(model: GptOssForCausalLM, initialization: Initialization) -> None:
    """Makes head h of every windowed layer attend looks_back[h] tokens back at the start.

    A constant query q and key k meet under rotary embeddings as q . R(j - i) k, for query position i and key position
    j: largest at j = i - d if q = R(-d) k. Only the fastest pairs carry this, the others are left for content.
    """
    config = model.config
    turns_P = model.model.rotary_emb.inv_freq[:POSITIONAL_PAIRS]
    half, size = config.head_dim // 2, initialization.positional_bias
    for kind, layer in zip(config.layer_types, model.model.layers, strict=True):
        if kind != "sliding_attention":
            continue
        query_HD = layer.self_attn.q_proj.bias.view(-1, config.head_dim)
        layer.self_attn.k_proj.bias.view(-1, config.head_dim)[:, :POSITIONAL_PAIRS] = size
        for head, query_D in enumerate(query_HD):
            angle_P = -initialization.looks_back[head % len(initialization.looks_back)] * turns_P
            query_D[:POSITIONAL_PAIRS] = size * angle_P.cos()
            query_D[half : half + POSITIONAL_PAIRS] = size * angle_P.sin()


def save_parent(folder: Path, parent: GptOssForCausalLM) -> None:
    """Writes the Hugging Face folder: weights, configs, tokenizer with chat template."""
    parent.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
