"""data.py: prompts carry their own effort; training, validation and measurement never meet."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lit_puzzle.data.rl_prompts import PromptData
from lit_puzzle.environments.environment import Environment, Problem, is_held_out
from lit_puzzle.evaluate.held_out import held_out_problems

NUMBERS = 125  # numbers below it; 16 of their problems are held out
TEMPLATE = (
    "Reasoning: {{ reasoning_effort }}|{% for message in messages %}{{ message['role'] }}={{ message['content'] }}|"
    "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


class Digits:
    """Asks for a random number back."""

    def __init__(self, name: str) -> None:
        self.name = name

    def problem(self, rng: random.Random) -> Problem:
        number = str(rng.randrange(10**6))
        return Problem(self.name, ({"role": "user", "content": f"{self.name} {number}"},), number)

    def verify(self, final: str, problem_answer: str) -> float:
        return float(final == problem_answer)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    built = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    built.chat_template = TEMPLATE
    return built


def make(**overrides: Any) -> PromptData:
    environments: list[Environment] = [Digits("a"), Digits("b")]
    settings: dict[str, Any] = {
        "efforts": {"low": 1.0, "high": 1.0},
        "train_prompts": 60,
        "held_out_per_effort": 10,
    } | overrides
    return PromptData(**({"environments": environments} | settings))


def test_prompts_are_text_with_their_own_effort(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = make().train_prompts(tokenizer)
    assert rows.column_names == ["prompt", "answer", "environment", "effort"] and len(rows) == 60
    for row in rows:
        question = f"{row['environment']} {row['answer']}"
        assert row["prompt"] == f"Reasoning: {row['effort']}|user={question}|assistant"
    assert {row["effort"] for row in rows} == {"low", "high"}
    assert [row["environment"] for row in rows][:3] == ["a", "b", "a"]


def test_training_and_validation_never_meet_and_seeds_do_what_they_say(tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = make(seed=1), make(seed=2)
    assert one.train_prompts(tokenizer)["prompt"] == make(seed=1).train_prompts(tokenizer)["prompt"]
    assert one.train_prompts(tokenizer)["prompt"] != other.train_prompts(tokenizer)["prompt"]
    assert one.held_out("low") == other.held_out("low") == one.held_out("high")
    assert make(held_out_seed=5).held_out("low") != one.held_out("low")
    held_out = one.held_out("low")
    assert all(is_held_out(problem) for problem in held_out) and len({p.text() for p in held_out}) == 10
    for row in one.train_prompts(tokenizer):
        question = row["prompt"].split("|user=")[1].split("|")[0]
        assert not is_held_out(Problem(row["environment"], ({"role": "user", "content": question},), row["answer"]))


def test_effort_of_weight_zero_is_neither_trained_nor_validated(tokenizer: PreTrainedTokenizerFast) -> None:
    data = make(efforts={"low": 0.0, "high": 1.0})
    assert set(data.train_prompts(tokenizer)["effort"]) == {"high"}
    assert {effort for batch in data.val_dataloader() for _, effort in batch} == {"high"}
    with pytest.raises(ValueError, match="'medium' was asked for"):
        data.held_out("medium")


def test_every_process_gets_all_validation_problems() -> None:
    """Processes share them when they answer: a second sharding here would lose answers."""

    def pairs(rank: int, world: int) -> list[Any]:
        data = make(validation_batch_size=4)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
        batches = list(data.val_dataloader())
        assert all(1 <= len(batch) <= 4 for batch in batches)
        return [pair for batch in batches for pair in batch]

    everything = [(problem, effort) for effort in ("low", "high") for problem in make().held_out(effort)]
    assert pairs(0, 1) == pairs(1, 3) == everything


class Few(Digits):
    """Has 14 held-out problems, so that two draws of 8 must overlap."""

    def problem(self, rng: random.Random) -> Problem:
        number = str(rng.randrange(NUMBERS))
        return Problem(self.name, ({"role": "user", "content": f"{self.name} {number}"},), number)


def test_validation_leaves_out_what_is_set_aside() -> None:
    held_out = [number for number in range(NUMBERS) if is_held_out(numbered(number))]
    assert len(held_out) == 14
    measured = [problem for problem, _ in held_out_problems([Few("few")], ["low", "high"], 7, seed=1)]
    data = make(environments=[Few("few")], held_out_per_effort=7)
    texts = {problem.text() for problem in measured}
    assert texts & {problem.text() for problem in data.held_out("low")}, "the draws do not overlap: nothing is tested"
    data.set_aside(measured)
    validated = data.held_out("low")
    assert validated == data.held_out("high") and len({problem.text() for problem in validated}) == 7
    assert not texts & {problem.text() for problem in validated}
    data.held_out_per_effort = 8
    with pytest.raises(ValueError, match="gave 14 different held-out problems and no further one"):
        data.held_out("low")


def numbered(number: int) -> Problem:
    return Problem("few", ({"role": "user", "content": f"few {number}"},), str(number))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"environments": []}, "names must differ"),
        ({"environments": [Digits("a"), Digits("a")]}, "names must differ"),
        ({"efforts": {}}, "Name at least one"),
        ({"efforts": {"extreme": 1.0}}, "extreme"),
        ({"efforts": {"low": -1.0}}, "weights >= 0"),
        ({"train_prompts": 0}, "train_prompts 0"),
        ({"held_out_per_effort": 1}, "held_out_per_effort 1"),
        ({"validation_batch_size": 0}, "validation_batch_size 0"),
    ],
)
def test_bad_values_are_refused_at_construction(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**bad)


def test_validation_has_the_efforts_that_are_trained_unless_told() -> None:
    """Validation chooses the best weights: an effort of weight 0 must not."""
    mix = {"low": 0.0, "medium": 1.0, "high": 2.0}

    def validated(**settings: Any) -> list[str]:
        data = make(efforts=mix, **settings)
        pairs = [pair for batch in data.val_dataloader() for pair in batch]
        assert len({problem.text() for problem, _ in pairs}) == 10
        return list(dict.fromkeys(effort for _, effort in pairs))

    assert validated() == ["medium", "high"]
    assert validated(validation_efforts=["low", "high"]) == ["low", "high"]
    assert list(make(efforts=mix).efforts) == ["low", "medium", "high"]  # of the measurement before and after
    with pytest.raises(ValueError, match="immense"):
        make(validation_efforts=["immense"])
    with pytest.raises(ValueError, match="Name at least one"):
        make(validation_efforts=[])
