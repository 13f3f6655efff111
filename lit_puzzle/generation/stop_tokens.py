"""Tokens that end a completion: those of the generation configuration and the tokenizer's end token.

Reads `generation_config.json` of a checkpoint folder; writes nothing.
"""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.model.opening import load_generation_config


def end_and_pad(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Return every token that ends a completion of a loaded model, and the padding token.

    Raises:
        ValueError: there is no end token or no padding token.
    """
    end_ids = _end_ids(policy.generation_config, tokenizer)
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer names no padding token. Set pad_token in the tokenizer's configuration.")
    return end_ids, int(tokenizer.pad_token_id)


def end_tokens_of(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends a completion of a checkpoint folder, as `end_and_pad` does.

    Raises:
        ValueError: there is no end token.
    """
    return _end_ids(load_generation_config(checkpoint), tokenizer)


def _end_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = config.eos_token_id
    known = configured if isinstance(configured, list) else [configured]
    end_ids = sorted({int(token) for token in [*known, tokenizer.eos_token_id] if token is not None})
    if not end_ids:
        raise ValueError(
            "The checkpoint names no end token. Set eos_token_id in generation_config.json, or eos_token in the "
            "tokenizer's configuration."
        )
    return end_ids
