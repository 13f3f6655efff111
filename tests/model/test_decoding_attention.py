"""Attention of generation: eager to the last bit while there are few scores or a cache, sink_attention beyond."""

import pytest
import torch
from transformers import DynamicCache, GptOssForCausalLM

import lit_puzzle.model.decoding_attention  # noqa: F401  (registers with transformers)

LIMIT = "lit_puzzle.model.decoding_attention.EAGER_SCORES"
ROWS, HEADS, TOKENS = 3, 4, 40


def logits(model: GptOssForCausalLM, attention: str) -> torch.Tensor:
    """Of padded prompts and, behind their cache, of one more token."""
    model.set_attn_implementation(attention)
    ids_BT = torch.randint(3, 128, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(2))
    mask_BT = torch.arange(TOKENS + 1) >= torch.tensor([0, 7, 31])[:, None]
    positions_BT, cache = (mask_BT.cumsum(-1) - 1).clamp(min=0), DynamicCache(config=model.config)
    parts = []
    for part in (slice(0, TOKENS), slice(TOKENS, TOKENS + 1)):
        seen_BK, places_BT = mask_BT[:, : part.stop], positions_BT[:, part]
        with torch.no_grad():
            output = model(ids_BT[:, part], seen_BK, places_BT, past_key_values=cache, use_cache=True)
        parts.append(output.logits[mask_BT[:, part]])
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("limit", "same_bits"), [(ROWS * HEADS * TOKENS**2, True), (ROWS * HEADS * TOKENS**2 - 1, False)]
)
def test_equal_to_eager(
    tiny_model: GptOssForCausalLM, monkeypatch: pytest.MonkeyPatch, limit: int, same_bits: bool
) -> None:
    monkeypatch.setattr(LIMIT, limit)
    expected, found = logits(tiny_model, "eager"), logits(tiny_model, "decoding_attention")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, expected) == same_bits
    assert same_bits or torch.equal(found[:-ROWS], logits(tiny_model, "sink_attention")[:-ROWS])
