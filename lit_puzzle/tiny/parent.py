"""The tiny parent before training: a stock GptOssForCausalLM whose initial weights let it learn fast.

Besides the lessons, three choices let two million parameters learn to reason in minutes. Embeddings are larger than the
output of the first layers, so that layer 1 can still identify its token. Heads of windowed layers attend a fixed number
of tokens back from the start: with rotary embeddings, constant query and key biases depend only on the distance. The
three tokens of a letter have similar vectors, so that what is learned for one applies to all.

Reads nothing; `save_parent` writes a Hugging Face folder. Source: this project's own.
Shapes: V vocabulary, C channels, H heads, D head dimension, P rotary pairs.
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM

from lit_puzzle.tiny.settings import Initialization, ParentShape
from lit_puzzle.tiny.tokenizer import CALL, build_tokenizer
from lit_puzzle.tiny.world import LETTERS

POSITIONAL_PAIRS = 4  # rotary pairs with positional biases, highest frequencies first


def build_parent(shape: ParentShape, initialization: Initialization) -> GptOssForCausalLM:
    """Return a stock gpt-oss with random weights; experts run by grouped matrix products.

    Raises:
        ValueError: the vocabulary is smaller than the tokenizer's.
    """
    tokenizer = build_tokenizer()
    if len(tokenizer) > shape.vocab_size:
        raise ValueError(f"vocab_size {shape.vocab_size} is too small: the tokenizer has {len(tokenizer)} tokens.")
    sizes = asdict(shape)
    attention = sizes.pop("attention")
    config = GptOssConfig(
        **sizes,
        **attention,
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
    """Set the rows of `` q=`` and `` q:`` to share * row(`q`) + sqrt(1 - share^2) * their own, of the same variance."""
    for letter in LETTERS:
        for form in (f" {letter}=", f" {letter}:"):
            own_C = matrix_VC[vocabulary[form]]
            matrix_VC[vocabulary[form]] = share * matrix_VC[vocabulary[letter]] + math.sqrt(1.0 - share**2) * own_C


def set_positional_biases(model: GptOssForCausalLM, initialization: Initialization) -> None:
    """Set biases with which head h of every windowed layer attends looks_back[h] tokens back.

    With rotary embeddings, the score of a constant query q at position i and a constant key k at position j is
    q . R(j - i) k. It is largest at j = i - d if q = R(-d) k. Only the fastest pairs get biases; the others are for
    content.
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
    """Write the Hugging Face folder: weights, configs, tokenizer with chat template."""
    parent.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
