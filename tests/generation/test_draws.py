"""Draws of tokens: what they depend on, their frequencies, and the set that top_p keeps."""

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from lit_puzzle.generation.draws import draw_tokens, restrict_to_top_p, uniforms
from lit_puzzle.generation.sampling import EngineSettings, Sampling

EDGE = 1 - 2.0**-53  # the largest uniform


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def philox_block(counter: int, key: tuple[int, int]) -> list[int]:
    """The ten rounds of Philox 4x64 as published, in Python's integers."""
    c, (k0, k1), word = [counter, 0, 0, 0], key, 2**64 - 1
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k0, second & word, first >> 64 ^ c[3] ^ k1, first & word]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return c


@pytest.mark.parametrize(("seed", "row"), [(0, 0), (5, 123456), (2**64 - 1, 2**40)])
def test_uniforms_are_philoxs_words_by_position(seed, row):
    words = [word for counter in range(1, 5) for word in philox_block(counter, (seed, row))]
    expected = [(word >> 11) / 2**53 for word in words]
    assert uniforms(seed, row, 0, 16).tolist() == expected
    for start in range(9):
        assert uniforms(seed, row, start, 5).tolist() == expected[start : start + 5]


def test_uniforms_of_rows_and_seeds_are_unrelated_and_even():
    drawn = np.stack([uniforms(seed, row, 0, 50) for seed in range(20) for row in range(20)])
    assert len(np.unique(drawn)) == drawn.size
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert chi_square(counts, 1000.0) < 43.8  # 19 degrees of freedom, p = 0.001
    correlation = np.asarray(np.corrcoef(drawn))[np.triu_indices(len(drawn), 1)]
    assert abs(correlation.mean()) < 0.002 and correlation.std() == pytest.approx(50**-0.5, rel=0.05)


def test_frequencies_are_those_of_the_tempered_softmax():
    logits_V = torch.tensor([0.0, 2.0, -1.0, 1.5, -3.0, 1.5])
    u_B = torch.from_numpy(uniforms(3, 1, 0, 40_000))
    drawn_B = draw_tokens(logits_V.expand(len(u_B), -1), 0.7, 1.0, u_B)
    weights = np.exp(np.array(logits_V.tolist()) / 0.7)
    expected = weights / weights.sum() * len(u_B)
    assert chi_square(np.bincount(drawn_B.numpy(), minlength=6), expected) < 20.5  # 5 degrees, p = 0.001


@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_set_of_transformers(top_p):
    torch.manual_seed(0)
    logits_BV = torch.randn(50, 300, dtype=torch.float64) * 3
    kept_BV = restrict_to_top_p(logits_BV.softmax(-1), top_p) > 0
    assert torch.equal(kept_BV, TopPLogitsWarper(top_p)(None, logits_BV).isfinite())
    u_B = torch.from_numpy(uniforms(0, 0, 0, 50))
    assert kept_BV.gather(1, draw_tokens(logits_BV, 1.0, top_p, u_B)[:, None]).all()


def test_frequencies_inside_top_p():
    probs = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    u_B = torch.from_numpy(uniforms(1, 2, 0, 20_000))
    drawn_B = draw_tokens(torch.tensor(np.log(probs)).expand(len(u_B), -1), 1.0, 0.65, u_B)
    counts = np.bincount(drawn_B.numpy(), minlength=5)
    assert counts[[0, 2, 4]].sum() == 0
    assert chi_square(counts[[1, 3]], np.array([4, 3]) / 7 * len(u_B)) < 10.8  # 1 degree, p = 0.001


def test_equally_likely_tokens_at_the_edge_of_top_p_go_by_id():
    kept_V = restrict_to_top_p(torch.full((1, 8), 1 / 8, dtype=torch.float64), 0.5)[0] > 0
    assert kept_V.tolist() == [True] * 4 + [False] * 4


def test_no_token_of_probability_0_is_drawn_at_either_edge():
    never = -torch.inf
    logits_BV = torch.tensor([[never, 0.0, never, 0.0, never], [never, never, 5.0, never, never]])
    for u, expected in ((0.0, [1, 2]), (0.49, [1, 2]), (0.5, [3, 2]), (EDGE, [3, 2])):
        u_B = torch.full((2,), u, dtype=torch.float64)
        for top_p in (1.0, 0.9999):
            assert draw_tokens(logits_BV, 1.0, top_p, u_B).tolist() == expected
    wide_BV = torch.cat([torch.randn(64, 50_000), torch.full((64, 9), never)], 1)
    drawn_B = draw_tokens(wide_BV, 1.0, 1.0, torch.full((64,), EDGE, dtype=torch.float64))
    assert wide_BV.gather(1, drawn_B[:, None]).isfinite().all()


def test_a_tiny_temperature_takes_the_most_likely_token():
    logits_BV = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -9.0, -4.0]])
    u_B = torch.tensor([EDGE, 0.0], dtype=torch.float64)
    for temperature in (1e-3, 1e-300, 5e-324):
        assert draw_tokens(logits_BV, temperature, 1.0, u_B).tolist() == [1, 2]


def test_a_draw_is_the_same_whatever_stands_beside_it(monkeypatch):
    torch.manual_seed(1)
    logits_BV, u_B = torch.randn(40, 1000), torch.from_numpy(uniforms(0, 7, 0, 40))
    together = draw_tokens(logits_BV, 0.8, 0.95, u_B).tolist()
    alone = [int(draw_tokens(logits_BV[[row]], 0.8, 0.95, u_B[[row]])) for row in range(40)]
    assert together == alone
    monkeypatch.setattr("lit_puzzle.generation.draws.CHUNK", 3500)
    assert draw_tokens(logits_BV, 0.8, 0.95, u_B).tolist() == together
    assert draw_tokens(logits_BV.bfloat16(), 0.0, 1.0, u_B).tolist() == logits_BV.bfloat16().argmax(-1).tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_wrong_sampling_is_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name} {str(wrong[name]).replace('+', '.')}"):
        Sampling(**wrong)


def test_wrong_engine_settings_are_refused():
    with pytest.raises(ValueError, match="batch_size 0"):
        EngineSettings(batch_size=0)
    with pytest.raises(ValueError, match="tensor_parallel 0"):
        EngineSettings(tensor_parallel=0)
