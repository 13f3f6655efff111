"""Evaluations: their items and scores, on one process and on two, with gathered weights and in step."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers.recovery_runs import Fingerprint, forked
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, GptOssForCausalLM

from lit_puzzle.environments.answer_formats import fix_format
from lit_puzzle.environments.environment import Environment, is_held_out
from lit_puzzle.evaluate.long_context import LongContextAccuracy
from lit_puzzle.evaluate.long_context_settings import Grading, LongContextProblems
from lit_puzzle.evaluate.solving import solve_problems
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.library.swap import swapped
from lit_puzzle.scoring.evaluations import by_effort, evaluation_items, items_identity, measuring, score_items
from lit_puzzle.scoring.score_files import Values
from lit_puzzle.spec import BlockSpec
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains, Counting
from lit_puzzle.training.fabric import FabricSettings, launch, load_parent

TOKENS = 12
EFFORTS = ("low", "high")
ON_CPU = FabricSettings(accelerator="cpu")
TINY_PARENT = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_parent"
BLOCK = BlockSpec((0, 1, 2, 5, 6, 7), 4)


@pytest.fixture(scope="module")
def parent(tiny_config, tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("evaluations") / "parent", build_tokenizer()
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = GptOssForCausalLM(tiny_config(num_hidden_layers=2, **special))
    model.generation_config.eos_token_id = list(range(20, 128, 4))  # so that completions end, each at its own time
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_task(problems: int = 3) -> LongContextAccuracy:
    asked = LongContextProblems(environments=[Fingerprint()], efforts=["low", "high"], problems_per_effort=problems)
    return LongContextAccuracy(
        asked, Grading(answer_format="whole"), sampling=Sampling(TOKENS, 0.0), batch_size=4, name="print"
    )


def all_values(parent: Path, settings: FabricSettings) -> dict[str, Values]:
    """Scores, lengths and ends of the parent, of the parent with a block replaced, and of the parent again."""
    processes, tokenizer, task = launch(settings), AutoTokenizer.from_pretrained(parent), make_task()
    model = load_parent(processes, settings, parent)
    score = partial(score_items, model, tokenizer, task, task.items(tokenizer), processes)
    found = {"parent": score(settings.unshard_evaluations)}
    with swapped(model, 1, BLOCK):
        found["child"] = score(settings.unshard_evaluations)
    return found | {"again": score(settings.unshard_evaluations)}


def test_problems_are_training_ones(parent):
    tokenizer = AutoTokenizer.from_pretrained(parent)
    environments: list[Environment] = [Chains(), Counting()]
    task = LongContextAccuracy(LongContextProblems(None, environments, None, ["low", "high"], problems_per_effort=4))
    items = task.items(tokenizer)
    assert items == task.items(tokenizer) and len(items) == 8
    assert [effort for _, effort in items] == ["low"] * 4 + ["high"] * 4
    assert not any(is_held_out(problem) for problem, _ in items)


def test_scores_are_those_of_the_completions(parent):
    found = all_values(parent, ON_CPU)
    assert found["parent"] == found["again"] != found["child"]
    tokenizer, model = AutoTokenizer.from_pretrained(parent), GptOssForCausalLM.from_pretrained(parent).eval()
    task = make_task()
    engine, sampling = TransformersEngine(model, tokenizer, 4), Sampling(TOKENS, 0.0)
    fix_format(tokenizer, "whole")
    episodes = solve_problems(engine, tokenizer, task.items(tokenizer), [Fingerprint()], sampling)
    lengths = [episode.generated_tokens for episode in episodes]
    assert found["parent"] == {
        "score": [episode.correct for episode in episodes],
        "tokens": lengths,
        "cut": [float(length == TOKENS and episode.finish == "length") for length, episode in zip(lengths, episodes)],
        "looping": [0.0] * 6,
    }
    assert 0 < sum(found["parent"]["cut"]) < 6
    grouped = by_effort(task, task.items(tokenizer), found["parent"])
    assert grouped.keys() == {
        "score",
        *(f"{name}/{effort}" for name in ("tokens", "cut", "looping") for effort in EFFORTS),
    }
    assert grouped["tokens/low"] == lengths[:3] and grouped["tokens/high"] == lengths[3:]
    assert max(lengths[0::2]) != max(lengths[1::2])  # two processes would decode different numbers of steps


def on_two(folder: Path, name: str, settings: FabricSettings, rank: int) -> None:
    (folder.parent / f"{name}{rank}.json").write_text(json.dumps(all_values(folder, settings)))


@pytest.mark.parametrize("name", ["gathered", "in step", "replicated"])
@pytest.mark.slow
def test_two_processes_score_like_one(parent, name):
    settings = FabricSettings(
        accelerator="cpu",
        devices=2,
        strategy="replicated" if name == "replicated" else "sharded",
        unshard_evaluations=name == "gathered",
    )
    assert forked(2, partial(on_two, parent, name, settings)) == [0, 0]
    one = all_values(parent, ON_CPU)
    for rank in (0, 1):
        assert json.loads((parent.parent / f"{name}{rank}.json").read_text()) == one


class FixedScores:
    """An evaluation with given scores."""

    name = "fixed"

    def __init__(self, scores: list[float], items: int = 3) -> None:
        self.given, self.size = scores, items

    def items(self, tokenizer: object) -> list[int]:
        return list(range(self.size))

    def scores(self, policy: object, tokenizer: object, items: list[int]) -> list[float]:
        return self.given


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (FixedScores([1.0, 0.0]), "gave 2 scores for 3 items"),
        (FixedScores([1.0, 0.0, 1.5]), "must give one in 0..1 for each"),
        (FixedScores([1.0, 0.0, float("nan")]), "must give one in 0..1 for each"),
    ],
)
def test_scores_outside_0_to_1_are_refused(parent, task, message):
    model = load_parent(launch(ON_CPU), ON_CPU, parent)
    with pytest.raises(ValueError, match=message):
        score_items(model, build_tokenizer(), task, task.items(None), launch(ON_CPU), True)


class Lengths(FixedScores):
    """An evaluation whose items have efforts and lengths."""

    def efforts(self, items: list[int]) -> list[str]:
        return ["low" if item < 2 else "high" for item in items]

    def values(self, policy: object, tokenizer: object, items: list[int]) -> Values:
        return {"score": [1.0] * len(items), "tokens": self.given}

    def values_by_engine(self, engine: object, tokenizer: object, items: list[int]) -> Values:
        raise AssertionError


def test_lengths_that_are_not_finite_are_refused_and_an_effort_of_one_item_left_out(parent):
    model, values = load_parent(launch(ON_CPU), ON_CPU, parent), {"score": [1.0, 1.0, 1.0], "tokens": [4.0, 5.0, 6.0]}
    assert by_effort(Lengths([]), [0, 1, 2], values) == {"score": [1.0, 1.0, 1.0], "tokens/low": [4.0, 5.0]}
    for wrong in ([4.0, 5.0], [4.0, 5.0, float("inf")]):
        with pytest.raises(ValueError, match="values 'tokens' for 3 items; it must give a finite one for each"):
            score_items(model, build_tokenizer(), Lengths(wrong), [0, 1, 2], launch(ON_CPU), True)


class OwnScores(Lengths):
    def scores(self, policy: object, tokenizer: object, items: list[int]) -> list[float]:
        return [0.25] * len(items)


def test_a_subclass_with_scores_of_its_own_is_scored_by_them(parent):
    model = load_parent(launch(ON_CPU), ON_CPU, parent)
    found = score_items(model, build_tokenizer(), OwnScores([4.0, 5.0, 6.0]), [0, 1, 2], launch(ON_CPU), True)
    assert found == {"score": [0.25] * 3}
    assert measuring(OwnScores([])) is None and None not in (measuring(Lengths([])), measuring(make_task()))


def test_one_item_has_no_standard_error():
    with pytest.raises(ValueError, match="'fixed' has 1 items; a standard error needs two"):
        evaluation_items(FixedScores([1.0], items=1), build_tokenizer(), 1000)


@pytest.mark.parametrize("mode", ["generated", "teacher_forced"])
def test_items_beyond_the_context_are_refused_before_a_model_is_loaded(mode: Literal["generated", "teacher_forced"]):
    """The longest item fits exactly, and not into one token less."""
    problems = LongContextProblems(environments=[Chains(), Counting()], efforts=["low", "high"], problems_per_effort=5)
    task, tokenizer = LongContextAccuracy(problems, Grading(mode)), build_tokenizer()
    longest = max(task.tokens(tokenizer, task.items(tokenizer)))
    assert len(evaluation_items(task, tokenizer, longest)) == 10
    with pytest.raises(ValueError, match=rf"'long_context': .* {longest} tokens; .* context holds {longest - 1} "):
        evaluation_items(task, tokenizer, longest - 1)


@torch.no_grad()
def teacher_forced(parent: Path, settings: FabricSettings) -> dict[str, Values]:
    """Teacher-forced scores of the parent, and of it with trained tensors in layer 0, with a pass in between."""
    processes, tokenizer = launch(settings), AutoTokenizer.from_pretrained(parent)
    problems = LongContextProblems(environments=[Chains(), Counting()], efforts=["low"], problems_per_effort=5)
    task = LongContextAccuracy(problems, Grading("teacher_forced"), batch_size=2)
    model = load_parent(processes, settings, parent)
    unshard = settings.unshard_evaluations
    score = partial(score_items, model, tokenizer, task, task.items(tokenizer), processes, unshard)
    shape = (model.config.hidden_size, model.config.num_attention_heads * model.config.head_dim)
    trained = {"self_attn.o_proj.weight": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    found = {"parent": score()}
    model(input_ids=torch.tensor([[5, 6, 7]]))  # through the layers, as the scores of blocks go
    if processes.world_size > 1 and settings.strategy == "sharded":
        assert all(isinstance(parameter, DTensor) for parameter in model.model.layers.parameters())
    with swapped(model, 0, BLOCK, trained):
        found["child"] = score()
    return found | {"again": score()}


def forced_on_two(folder: Path, settings: FabricSettings, rank: int) -> None:
    (folder / f"{rank}.json").write_text(json.dumps(teacher_forced(TINY_PARENT, settings)))


@pytest.mark.parametrize("unshard", [True, False], ids=["gathered", "in step"])
@pytest.mark.slow
def test_two_processes_are_teacher_forced_like_one(tmp_path, unshard):
    settings = FabricSettings(accelerator="cpu", devices=2, unshard_evaluations=unshard)
    assert forked(2, partial(forced_on_two, tmp_path, settings)) == [0, 0]
    one = teacher_forced(TINY_PARENT, ON_CPU)
    assert (
        one["parent"] == one["again"] != one["child"]
        and one["parent"].keys() == {"score"}
        and len(one["parent"]["score"]) == 5
    )
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == one


def test_items_are_identified_by_what_they_say() -> None:
    task = make_task()
    first, again, other = ([Chains().problem(random.Random(seed)), object()] for seed in (0, 0, 1))
    assert items_identity(task, first) == items_identity(task, again) != items_identity(task, other)
