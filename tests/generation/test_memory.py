"""Memory of generation grows with the tokens, not with their square: prompts, and completions behind them."""

import pytest
import torch
from helpers import anonymous_memory
from helpers.live_bytes import LiveBytes
from helpers.wide_head import HEAD_BYTES, wide_model
from transformers import GptOssForCausalLM

from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.tiny.tokenizer import build_tokenizer


def peak_bytes(model: GptOssForCausalLM, rows: int, prompt: int, completion: int) -> int:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2)
    model.generation_config.eos_token_id = [2]
    model.config.max_position_embeddings = prompt + completion
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # it never ends before the cap
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 128, (rows, prompt), generator=generator).tolist()
    with LiveBytes() as live:
        done = TransformersEngine(model, tokenizer, rows).generate(prompts, Sampling(completion, temperature=0.0))
    assert [len(completion_.token_ids) for completion_ in done] == [completion] * rows
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "attention"), [(torch.float32, "eager"), (torch.bfloat16, "sink_attention")])
def test_long_completions_are_never_read_again(
    tiny_model: GptOssForCausalLM, dtype: torch.dtype, attention: str
) -> None:
    """One tensor of scores over prompt and completion would be 4 rows * 4 heads * 1,200^2 * 4 bytes = 92 MB."""
    tiny_model.set_attn_implementation(attention)
    model = tiny_model.to(dtype)
    peaks = [peak_bytes(model, 4, 50, tokens) for tokens in (300, 600, 1200)]
    assert peaks[2] < 12e6
    assert peaks[2] - peaks[1] < 2.4 * (peaks[1] - peaks[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "attention"),
    [
        (torch.float32, "sink_attention"),
        (torch.float32, "decoding_attention"),
        (torch.bfloat16, "sink_attention"),
    ],
)
def test_long_prompts_are_read_in_linear_memory(
    tiny_model: GptOssForCausalLM, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, attention: str
) -> None:
    """One tensor of scores of a prompt would be 4 heads * 8,192^2 * 2 bytes = 537 MB."""
    monkeypatch.setattr("lit_puzzle.model.decoding_attention.EAGER_SCORES", 4 * 512**2)
    tiny_model.set_attn_implementation(attention)
    model = tiny_model.to(dtype)
    peaks = [peak_bytes(model, 1, tokens, 2) for tokens in (2048, 4096, 8192)]
    assert peaks[2] < 64e6
    assert peaks[2] < 2.2 * peaks[1]


@pytest.mark.slow
def test_the_head_is_not_copied_for_every_row() -> None:
    """A CPU copies frozen weights in bfloat16 for every row of a batch of states that is not contiguous."""
    rows, engine = 16, TransformersEngine(wide_model(), build_tokenizer(), 16)
    prompts = [[9, 11, 40, 30 + row] for row in range(rows)]
    grown = anonymous_memory.peak_bytes(lambda: engine.generate(prompts, Sampling(2, temperature=0.0)))
    assert grown < 3 * HEAD_BYTES < rows * HEAD_BYTES / 4, f"{grown / 2**20:.0f} MiB"
