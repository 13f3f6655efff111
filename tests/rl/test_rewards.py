"""rewards.py: rewards from token ids in TRL's calling form, and the weights of a recipe."""

import math
import pickle
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.trainer.utils import get_callable_name

from lit_puzzle.environments.answer_formats import AnswerFormat, fix_format
from lit_puzzle.environments.environment import Problem
from lit_puzzle.generation.lengths import LengthStatistics, write_lengths
from lit_puzzle.rl.length_rewards import Budget, LengthLimit, Looping, Overlong
from lit_puzzle.rl.length_settings import BudgetSettings, EndingSettings, GroupLengthSettings, OverlongSettings
from lit_puzzle.rl.rewards import Correctness, Finished, NoAnalysis, build_rewards, length_rewards
from lit_puzzle.rl.settings import ExtraReward, RewardSettings
from lit_puzzle.rl.shared_rewards import GroupLength
from lit_puzzle.run.recipe import PACKAGED_RECIPES, load_recipe
from lit_puzzle.training.lightning import RecipeCLI

SPECIALS = ["<|pad|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
HARMONY = AnswerFormat("harmony", "<|return|>")
RIGHT = ["<|channel|>", "final", "<|message|>", "7", "<|return|>"]
THOUGHT = ["<|channel|>", "analysis", "<|message|>", "8", "<|end|>", "<|start|>", "assistant", *RIGHT]


class Fixed:
    """Right means: the final text is the answer (or, `negated`, is not)."""

    def __init__(self, name: str, negated: bool = False) -> None:
        self.name = name
        self.negated = negated

    def problem(self, rng: random.Random) -> Problem:
        return Problem(self.name, ({"role": "user", "content": str(rng.random())},), "7")

    def verify(self, final: str, problem_answer: str) -> float:
        return float((final == problem_answer) != self.negated)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIALS, "final", "analysis", "7", "8", "assistant"]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|pad|>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = decoders.Fuse()
    built = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<|pad|>", eos_token="<|return|>")
    built.add_special_tokens({"additional_special_tokens": SPECIALS[1:5]})
    return built


def called_as_trl_does(reward: Callable[..., list[float]], tokenizer: Any, *answers: list[str], **columns: Any) -> Any:
    """Calls a reward with every argument that GRPOTrainer passes: texts without special tokens, lists of token ids."""
    ids = [tokenizer.convert_tokens_to_ids(answer) for answer in answers]
    count = len(answers)
    return reward(
        prompts=["q"] * count,
        completions=tokenizer.batch_decode(ids, skip_special_tokens=True),
        completion_ids=ids,
        **({"answer": ["7"] * count, "environment": ["a"] * count, "effort": ["high"] * count} | columns),
        trainer_state=object(),
        log_extra=print,
        log_metric=print,
    )


def test_correctness_sees_special_tokens_and_uses_the_right_environment(tokenizer: PreTrainedTokenizerFast) -> None:
    reward = Correctness((Fixed("a"), Fixed("b", negated=True)), tokenizer, HARMONY)
    cut = RIGHT[:-1]
    thought = ["<|channel|>", "analysis", "<|message|>", "7", "<|return|>"]
    wrong = [*RIGHT[:3], "8", "<|return|>"]
    assert called_as_trl_does(reward, tokenizer, RIGHT, cut, thought, wrong) == [1.0, 0.0, 0.0, 0.0]
    mixed = called_as_trl_does(reward, tokenizer, RIGHT, RIGHT, wrong, environment=["a", "b", "b"])
    assert mixed == [1.0, 0.0, 1.0]
    assert called_as_trl_does(reward, tokenizer, RIGHT, RIGHT, answer=["8", "7"]) == [0.0, 1.0]


def test_unknown_environment_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"environments \['c'\] were given; the reward knows \['a'\]"):
        called_as_trl_does(Correctness((Fixed("a"),), tokenizer, HARMONY), tokenizer, RIGHT, environment=["c"])


def test_finished_is_about_form_not_about_being_right(tokenizer: PreTrainedTokenizerFast) -> None:
    wrong = [*RIGHT[:3], "8", "<|return|>"]
    assert called_as_trl_does(Finished(tokenizer, HARMONY), tokenizer, RIGHT, wrong, RIGHT[:-1]) == [1.0, 1.0, 0.0]


def test_rewards_pickle_and_carry_the_names_trl_logs(tokenizer: PreTrainedTokenizerFast) -> None:
    rewards = {
        "correctness": (Correctness((Fixed("a"),), tokenizer, HARMONY), 1.0),
        "finished": (Finished(tokenizer, HARMONY), 1.0),
        "length_limit": (LengthLimit({"high": 3.0}, {"high": 7.0}), -0.5),
        "budget": (Budget({"high": 1.0}, {"high": 9.0}), -0.5),
        "overlong": (Overlong(max_new_tokens=6, buffer_tokens=4), -0.75),
        "looping": (Looping(), 0.0),
        "group_length": (GroupLength(), 5.0),
        "no_analysis": (NoAnalysis(tokenizer, HARMONY, ("high",)), -1.0),
    }
    for name, (reward, value) in rewards.items():
        assert get_callable_name(reward) == name
        assert called_as_trl_does(pickle.loads(pickle.dumps(reward)), tokenizer, RIGHT) == [value]


def test_answers_without_thinking_cost_one_at_some_efforts(tokenizer: PreTrainedTokenizerFast) -> None:
    reward = NoAnalysis(tokenizer, HARMONY, ("medium", "high"))
    efforts = ["low", "high", "medium", "high"]
    assert called_as_trl_does(reward, tokenizer, RIGHT, RIGHT, RIGHT, THOUGHT, effort=efforts) == [0.0, -1.0, -1.0, 0.0]
    settings = RewardSettings(endings=EndingSettings(no_analysis=0.5), answer_format="plain")
    plain = deepcopy(tokenizer)
    fix_format(plain, "plain")
    with pytest.raises(ValueError, match=r"no_analysis=0\.5 was given, .* of the format plain no thinking"):
        build_rewards(settings, [], [Fixed("a")], plain, [])


def test_correctness_logs_how_completions_end(tokenizer: PreTrainedTokenizerFast) -> None:
    loop = [*RIGHT[:3], *["7"] * 80]
    ids = [tokenizer.convert_tokens_to_ids(completion) for completion in (RIGHT, THOUGHT, loop, RIGHT[:1])]
    logged: dict[str, float] = {}
    reward = Correctness((Fixed("a"),), tokenizer, HARMONY)
    columns: dict[str, Any] = {"answer": ["7"] * 4, "environment": ["a"] * 4}
    assert reward(completion_ids=ids, **columns, log_metric=logged.__setitem__) == [1.0, 1.0, 0.0, 0.0]
    assert logged == {"unfinished": 0.5, "no_final": 0.5, "looping": 0.25, "no_analysis": 0.75}
    assert reward(completion_ids=ids, **columns) == [1.0, 1.0, 0.0, 0.0]


def test_build_rewards_leaves_out_zero_weights(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def built(settings: RewardSettings) -> tuple[list[str], list[float]]:
        lengths = length_rewards(settings, ["high"], tmp_path, 32)
        functions, weights = build_rewards(settings, [], [Fixed("a")], tokenizer, lengths)
        return [get_callable_name(function) for function in functions], weights

    assert built(RewardSettings()) == (["correctness"], [1.0])
    write_lengths(tmp_path, {"high": LengthStatistics(mean=4.0, p50=4.0, p95=6.0)})
    names = ["correctness", "finished", "length_limit"]
    assert built(RewardSettings(finished=0.1, length=0.5)) == (names, [1.0, 0.1, 0.5])
    every = RewardSettings(
        length=0.1,
        budget=BudgetSettings(0.2),
        group_length=GroupLengthSettings(0.3),
        overlong=OverlongSettings(0.4),
        endings=EndingSettings(looping=0.5, no_analysis=0.6),
    )
    names = ["correctness", "no_analysis", "length_limit", "budget", "group_length", "overlong", "looping"]
    assert built(every) == (names, [1.0, 0.6, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    "bad",
    [
        {"correctness": -1.0},
        {"correctness": 0.0},
        {"length_start": 2.0},
        {"length_start": -0.5},
        {"correctness": 0.0, "finished": 1.0, "group_length": GroupLengthSettings(0.5)},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"w(as|ere) given"):
        RewardSettings(**bad)


def longer_is_better(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def test_extra_rewards_come_last_with_their_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    extra = [ExtraReward(longer_is_better, weight) for weight in (-0.25, 0.0)] + [ExtraReward(longer_is_better)]
    functions, weights = build_rewards(RewardSettings(), extra, [Fixed("a")], tokenizer, [])
    assert weights == [1.0, -0.25, 1.0] and functions[1:] == [longer_is_better] * 2
    with pytest.raises(ValueError, match="weight nan was given; it must be finite"):
        ExtraReward(longer_is_better, math.nan)


def test_a_recipe_gives_extra_rewards_by_path_or_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user does: functions by dotted path, callable objects by class path; a weight is 1 unless given."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rewards.py").write_text(
        "class Longer:\n"
        "    def __init__(self, tokens: int) -> None:\n"
        "        self.tokens = tokens\n"
        "    def __call__(self, *, completion_ids: list[list[int]], **columns: object) -> list[float]:\n"
        "        return [len(ids) / self.tokens for ids in completion_ids]\n\n\n"
        "def shorter(*, completion_ids: list[list[int]], **columns: object) -> list[float]:\n"
        "    return [-float(len(ids)) for ids in completion_ids]\n"
    )
    longer = {"class_path": "own_rewards.Longer", "init_args": {"tokens": 4}}
    given = [{"function": "own_rewards.shorter", "weight": 0.5}, {"function": longer}]
    recipe: dict[str, Any] = {"base": str(PACKAGED_RECIPES / "rl_recover.yaml"), "run_dir": str(tmp_path / "run")}
    recipe |= {"model": {"init_args": {"extra_rewards": given}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    module = RecipeCLI(load_recipe(str(tmp_path / "own.yaml")), ["--trainer.accelerator=cpu"]).model
    first, second = module.extra_rewards
    assert (first.weight, second.weight) == (0.5, 1.0)
    assert first.function(completion_ids=[[1, 2]]) == [-2.0] and second.function(completion_ids=[[1, 2]]) == [0.5]
