"""The paper's own tables from its published throughputs, tokens and accuracies; a comparison by hand; refusals."""

import math
from collections.abc import Mapping

import pytest

from lit_puzzle.report.request_rates import Model, Setting, judge, relative_request_rates

TASKS = ("MMLU-Pro", "GPQA-D", "HLE", "AA-LCR", "AIME25", "IFBench", "SciCode", "RULER-128K")
# arXiv 2602.11937, FP8 KV cache: accuracy per task; tokens in thousands; tokens per second at 64K/64K on 8 H100, in
# thousands (5.7 and 9.3 in its table of headline results; its plot of throughputs has 5.8). Its request rates count
# from the parent with a BF16 cache at high effort: 4.0 and 12.70.
PARENT = {
    "high": (13.05, (80.60, 77.34, 18.86, 46.75, 89.58, 65.76, 40.83, 45.82)),
    "medium": (3.05, (78.71, 68.88, 9.68, 41.50, 77.92, 58.67, 42.75, 45.04)),
    "low": (1.35, (75.04, 60.54, 4.40, 34.75, 51.88, 43.71, 40.09, 47.28)),
}
CHILD = {
    "high": (14.28, (79.19, 75.25, 16.40, 40.75, 93.33, 67.01, 41.42, 56.02)),
    "medium": (4.79, (78.18, 71.15, 10.47, 35.75, 86.67, 63.35, 40.09, 53.77)),
    "low": (1.73, (75.62, 63.51, 5.51, 28.75, 62.89, 56.21, 38.46, 56.11)),
}
BF16 = {"high": 12.70, "medium": 2.97, "low": 1.34}


def published(table: Mapping[str, tuple[float, tuple[float, ...]]], throughput: float) -> Model:
    settings = {e: Setting(dict(zip(TASKS, accuracy, strict=True)), tokens) for e, (tokens, accuracy) in table.items()}
    return Model(settings, throughput)


def test_the_papers_request_rates() -> None:
    parent, child = published(PARENT, 5.7), published(CHILD, 9.3)
    one = Model({effort: Setting({"suite": 1.0}, tokens) for effort, tokens in BF16.items()}, 4.0)
    for model, expected in ((parent, (1.401, 5.991, 13.270)), (child, (2.077, 6.193, 17.179))):
        found = relative_request_rates(model, one, "high")
        assert [found[effort] for effort in PARENT] == pytest.approx(expected, rel=0.02)
    # tokens are a scale: rates of the parent itself
    assert relative_request_rates(one, one, "high") == pytest.approx({"high": 1.0, "medium": 4.280, "low": 9.455}, 0.01)


def test_the_papers_retention_with_and_without_ruler() -> None:
    found = judge(published(PARENT, 5.7), published(CHILD, 9.3), "high")
    assert [found[f"accuracy/{e}/parent"] for e in PARENT] == pytest.approx([58.19, 52.89, 44.71], abs=0.006)
    assert [found[f"accuracy/{e}/child"] for e in PARENT] == pytest.approx([58.67, 54.93, 48.38], abs=0.006)
    assert [found[f"accuracy/{e}/retention"] for e in PARENT] == pytest.approx([1.008, 1.039, 1.082], abs=6e-4)
    without = [found[f"retention/{e}/without RULER-128K"] for e in PARENT]
    assert without == pytest.approx([0.985, 1.020, 1.066], abs=6e-4)
    assert found["retention/high/AA-LCR"] == pytest.approx(40.75 / 46.75)
    assert [found[f"request_rate/{e}/ratio"] for e in PARENT] == pytest.approx([1.48, 1.03, 1.29], rel=0.02)
    assert found["effort_length_ratio/parent"] == pytest.approx(13.05 / 1.35)


def test_a_comparison_by_hand() -> None:
    parent = Model({"low": Setting({"a": 0.4, "b": 0.6}, 10.0), "high": Setting({"a": 0.8, "b": 0.8}, 40.0)}, 100.0)
    child = Model({"low": Setting({"a": 0.5, "b": 0.7}, 10.0), "high": Setting({"a": 0.9, "b": 0.9}, 40.0)}, 200.0)
    found = judge(parent, child, "low")
    assert found["request_rate/low/child"] == 2 and found["request_rate/high/child"] == 0.5
    # the child's low effort: accuracy .6, cost 1/2; the parent has .6 a third of the way from cost 1 to cost 4
    assert found["speed_up/low"] == pytest.approx(2 * (1 + 1 / 3 * 3))
    assert "speed_up/high" not in found  # no setting of the parent has .9
    assert found["accuracy/low/retention"] == pytest.approx(1.2) and found["retention/low/a"] == pytest.approx(1.25)
    assert found["retention/low/without a"] == pytest.approx(0.7 / 0.6)
    assert found["effort_length_ratio/child"] == 4


@pytest.mark.parametrize(
    ("child", "reference", "message"),
    [
        (Model({"low": Setting({"a": 1}, 1)}, 1), "high", "child at \\['low'\\]"),
        (Model({"high": Setting({"b": 1}, 1)}, 1), "high", "tasks are \\['a'\\], the child's \\['b'\\]"),
        (Model({"high": Setting({"a": 1}, 0.0)}, 1), "high", "tokens of the child at high effort: 0.0"),
        (Model({"high": Setting({"a": 1}, 1)}, math.nan), "high", "throughput of the child: nan"),
        (Model({"high": Setting({"a": 1}, 1)}, 1), "low", "reference_effort 'low'"),
    ],
)
def test_models_that_cannot_be_compared(child: Model, reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(Model({"high": Setting({"a": 1.0}, 2.0)}, 3.0), child, reference)


def test_a_parent_that_solves_nothing_has_no_retention() -> None:
    model = Model({"high": Setting({"a": 0.0}, 2.0)}, 3.0)
    assert "accuracy/high/retention" not in judge(model, model, "high")
