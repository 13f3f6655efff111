"""serving.py: a recipe takes a user's own source of times by class_path, with and without postponed annotations."""

from pathlib import Path

import pytest

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import KernelTimes
from lit_puzzle.run.parser import RecipeParser
from lit_puzzle.run.recipe import Recipe
from lit_puzzle.search.search import search
from lit_puzzle.spec import Scenario

TARGETS = (
    "--constraints.targets=[{scenario: {gpu: cpu, num_gpus: 1, prompt_tokens: 4, generated_tokens: 4}, budget: {}}]"
)
CONFIG = {
    "model_type": "gpt_oss",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "num_experts_per_tok": 1,
}
FUTURE = "from __future__ import annotations\n"
SOURCE = """
from dataclasses import dataclass
from typing import ClassVar

from lit_puzzle.costs.serving import Block, Setting


@dataclass(frozen=True)
class Mine:
    name: ClassVar[str] = "mine"
    seconds: float = 1.0

    def check(self, setting: Setting) -> None:
        assert setting.model.hidden == 8

    def decode_layer(self, setting: Setting, block: Block, batch_size: int, context_tokens: float) -> float:
        return self.seconds

    def prefill_layer(self, setting: Setting, block: Block, prompt_tokens: int) -> float:
        return self.seconds

    def decode_rest(self, setting: Setting, batch_size: int) -> float:
        return self.seconds

    def prefill_rest(self, setting: Setting, prompt_tokens: int) -> float:
        return self.seconds
"""


def parsed(class_path: str) -> KernelTimes:
    """Return `costs.times` of the stage `search`, as a recipe gives it."""
    parser = RecipeParser(parser_mode="omegaconf+")
    parser.recipe = Recipe(Path("mine.yaml"), (), ())
    parser.add_function_arguments(search)
    paths = [f"--{name}=." for name in ("run_dir", "library", "scores")]
    given = f"--costs.times={{class_path: {class_path}, init_args: {{seconds: 0.25}}}}"
    times: KernelTimes = parser.instantiate(parser.parse_args([*paths, TARGETS, given])).costs.times
    return times


@pytest.mark.parametrize("first_line", ["", FUTURE], ids=["plain", "future"])
def test_a_source_of_times_by_class_path(first_line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "seconds_future" if first_line else "seconds_plain"
    (tmp_path / f"{name}.py").write_text(first_line + SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    times = parsed(f"{name}.Mine")
    costs = CostModel(ModelShape.from_config(CONFIG), Scenario("cpu", 1, 4, 4), times)
    assert costs.rest(costs.deployments()[0], 1).decode_seconds == 0.25


def test_a_class_that_is_no_source_of_times_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seconds_short.py").write_text(SOURCE.replace("prefill_rest", "other"))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"mine\.yaml: (?s:.*)does not implement protocol KernelTimes"):
        parsed("seconds_short.Mine")
