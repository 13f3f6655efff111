"""A random parent and a random child of the same shape, for comparisons of text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssForCausalLM

from lit_puzzle.tiny.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def two_models(tiny_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `parent` and `child`, other weights in each."""
    root = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("parent", "child")):
        torch.manual_seed(seed)
        GptOssForCausalLM(tiny_config(vocab_size=128, max_position_embeddings=64)).save_pretrained(root / name)
        build_tokenizer().save_pretrained(root / name)
    return root
