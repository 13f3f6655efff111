"""long_context.py: exact prompt lengths under a BPE, teacher forcing against generation, windows on the tiny parent."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.by_generate import by_generate
from helpers.text_solvers import solve
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, GptOssForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lit_puzzle.environments.answer_formats import answer_format
from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import Environment, PromptAtEffort, is_held_out
from lit_puzzle.environments.long_context_tasks import Retrieval, VariableChain, default_tasks
from lit_puzzle.environments.long_context_text import TextTask
from lit_puzzle.evaluate.long_context import LongContextAccuracy
from lit_puzzle.evaluate.long_context_settings import Grading, LongContextProblems
from lit_puzzle.evaluate.solving import solve_problems
from lit_puzzle.evaluate.teacher_forcing import reference_answer, teacher_forced_hits
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.model.loading import load_model
from lit_puzzle.scoring.evaluations import Evaluation
from lit_puzzle.tiny.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS
from lit_puzzle.tiny.world import Chains, Counting, Sorting

GREEDY = Sampling(96, temperature=0.0)
PARENT = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_parent"


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens, trained on texts of other seeds, with the harmony-like chat template."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    rng = random.Random(99)
    texts = [task.problem(rng).text() for task in default_tasks() for _ in range(3)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=list(SPECIAL_TOKENS))
    model.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<|endoftext|>", eos_token="<|return|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def accuracy(
    tasks: list[TextTask] | None = None,
    environments: list[Environment] | None = None,
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    **settings: Any,
) -> LongContextAccuracy:
    """Settings of the problems and of the grading, each put where it belongs."""
    graded = {name: settings.pop(name) for name in ("mode", "graded", "credit") if name in settings}
    problems = LongContextProblems(tasks, environments, **settings)
    return LongContextAccuracy(problems, Grading(**graded), sampling, batch_size)


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, item: PromptAtEffort) -> int:
    return len(tokenizer(render_prompt(tokenizer, *item), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("tokens", [400, 1003])
def test_prompts_have_exactly_the_asked_tokens(bpe: PreTrainedTokenizerFast, tokens: int) -> None:
    evaluation = accuracy(context_tokens=tokens, efforts=["high"], problems_per_effort=12)
    items = evaluation.items(bpe)
    assert [prompt_tokens(bpe, item) for item in items] == [tokens] * 12
    assert {problem.environment for problem, _ in items} == {task.name for task in default_tasks()}
    for problem, _ in items:
        assert sorted(solve(problem.messages[0]["content"])) == sorted(problem.answer.split(", "))


def test_items_are_deterministic_and_the_same_at_each_effort(bpe: PreTrainedTokenizerFast) -> None:
    def make(seed: int) -> LongContextAccuracy:
        settings: dict[str, Any] = {"efforts": ["low", "medium", "high"], "problems_per_effort": 4}
        return accuracy([Retrieval()], [Chains()], seed=seed, context_tokens=300, **settings)

    items = make(0).items(bpe)
    assert items == make(0).items(bpe) and items != make(1).items(bpe)
    assert [problem for problem, _ in items[:4]] == [problem for problem, _ in items[8:]]
    assert [effort for _, effort in items] == ["low"] * 4 + ["medium"] * 4 + ["high"] * 4
    assert [problem.environment for problem, _ in items[:4]] == ["retrieval", "chains"] * 2
    lengths = [prompt_tokens(bpe, item) for item in items if item[0].environment == "retrieval"]
    assert max(lengths) == 300
    assert not any(is_held_out(problem) for problem, _ in items if problem.environment == "chains")


def test_needles_step_through_all_depths(bpe: PreTrainedTokenizerFast) -> None:
    evaluation = accuracy([Retrieval()], context_tokens=1500, problems_per_effort=10)
    depths = []
    for problem, _ in evaluation.items(bpe):
        text = problem.messages[0]["content"]
        key = re.search(r"[a-z]+-[a-z]+-\d{3}", text.split("\n")[-1])
        assert key is not None
        depths.append(text.index(f"The note on {key[0]} says") / len(text))
    assert depths == pytest.approx([0.05 + 0.1 * index for index in range(10)], abs=0.07)


def parent(window_of_layer: dict[int, int] | None = None) -> PreTrainedModel:
    """The tiny parent as a child with the same weights, some full-attention layers windowed."""
    stock = load_model(PARENT, "float32")
    blocks = [
        {"num_local_experts": 16, "sliding_window": None if layer % 2 else 16}
        | ({"sliding_window": window_of_layer[layer]} if window_of_layer and layer in window_of_layer else {})
        for layer in range(6)
    ]
    child = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(stock.config, blocks)).eval()
    child.load_state_dict(stock.state_dict())
    return child


@pytest.fixture(scope="module")
def models_by_name() -> dict[str, PreTrainedModel]:
    return {
        "parent": load_model(PARENT, "float32"),
        "identity": parent(),
        "window on layer 1": parent({1: 16}),
        "window on layer 3": parent({3: 16}),
    }


WORLD: list[Environment] = [Chains((0, 0, 40, 30, 30)), Sorting(), Counting()]


FORCED = {"mode": "teacher_forced", "graded": "completion"}


@pytest.mark.parametrize(
    ("settings", "parent_above", "drop_of_layer_1", "drop_of_layer_3"),
    [
        ({"mode": "generated"}, 0.6, 0.5, 0.2),
        (FORCED | {"credit": "exact"}, 0.6, 0.5, 0.6),
        (FORCED | {"credit": "share"}, 0.95, 0.12, 0.06),
    ],
    ids=["generated", "exact", "share"],
)
@pytest.mark.slow
def test_window_on_the_vital_layer_collapses_the_score(
    models_by_name: dict[str, PreTrainedModel],
    settings: dict[str, Any],
    parent_above: float,
    drop_of_layer_1: float,
    drop_of_layer_3: float,
) -> None:
    evaluation = accuracy(environments=WORLD, efforts=["medium", "high"], problems_per_effort=15, **settings)
    tokenizer = AutoTokenizer.from_pretrained(PARENT)
    items = evaluation.items(tokenizer)
    scores = {name: evaluation.scores(model, tokenizer, items) for name, model in models_by_name.items()}
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    assert scores["identity"] == scores["parent"]
    assert mean["parent"] > parent_above
    assert mean["parent"] - mean["window on layer 1"] > drop_of_layer_1
    assert mean["parent"] - mean["window on layer 3"] < drop_of_layer_3


def test_exact_completion_is_greedy_decoding_of_the_reference(models_by_name: dict[str, PreTrainedModel]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PARENT)
    settings: dict[str, Any] = {"efforts": ["low", "medium", "high"], "problems_per_effort": 6}
    forced = accuracy(
        environments=WORLD, mode="teacher_forced", graded="completion", credit="exact", batch_size=5, **settings
    )
    items = forced.items(tokenizer)
    model = models_by_name["parent"]
    prompts = [tokenizer(render_prompt(tokenizer, *item), add_special_tokens=False)["input_ids"] for item in items]
    written = [tokenizer.decode(done.token_ids) for done in by_generate(model, prompts, 96)]
    by_name = {environment.name: environment for environment in WORLD}
    expected = [
        float(text == reference_answer(by_name[problem.environment], problem, effort, answer_format(tokenizer)))
        for text, (problem, effort) in zip(written, items, strict=True)
    ]
    assert forced.scores(model, tokenizer, items) == expected
    assert 0 < sum(expected) < len(expected)  # both outcomes occur


def test_generated_scores_are_those_of_the_completions(models_by_name: dict[str, PreTrainedModel]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PARENT)
    sampling = Sampling(40, 0.0)
    evaluation = accuracy(environments=WORLD, problems_per_effort=6, sampling=sampling)
    items = evaluation.items(tokenizer)
    model = models_by_name["window on layer 1"]
    episodes = solve_problems(TransformersEngine(model, tokenizer, 3), tokenizer, items, WORLD, sampling)
    assert evaluation.scores(model, tokenizer, items) == [episode.correct for episode in episodes]


def test_sampled_scores_depend_on_the_item_alone(models_by_name: dict[str, PreTrainedModel]) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(PARENT), models_by_name["window on layer 1"]
    evaluation = accuracy(environments=WORLD, problems_per_effort=18, sampling=Sampling(24, 1.0, seed=3))
    items = evaluation.items(tokenizer)
    scores = evaluation.scores(model, tokenizer, items)
    halves = [evaluation.scores(model, tokenizer, items[rank::2]) for rank in range(2)]
    assert [halves[place % 2][place // 2] for place in range(18)] == scores
    assert 0 < sum(scores) < 18


@pytest.mark.parametrize("attention", ["eager", "sink_attention"])
def test_hits_are_those_of_single_forward_passes(
    tiny_model: GptOssForCausalLM, bpe: PreTrainedTokenizerFast, attention: str
) -> None:
    """Rows of unequal lengths in batches against one unpadded row at a time; logits only where they are graded."""
    rng = random.Random(1)
    rows = []
    for given_tokens, graded_tokens in ((12, 3), (30, 1), (9, 5), (25, 2), (9, 4)):
        given = [rng.randrange(128) for _ in range(given_tokens)]
        first = int(tiny_model(torch.tensor([given])).logits[0, -1].argmax())
        rows.append((given, [first, *(rng.randrange(128) for _ in range(graded_tokens - 1))]))
    expected = []
    for given, graded in rows:
        guess = tiny_model(torch.tensor([given + graded])).logits[0, len(given) - 1 : -1].argmax(-1)
        expected.append((guess == torch.tensor(graded)).tolist())
    tiny_model.set_attn_implementation(attention)
    shapes: list[tuple[int, ...]] = []
    hook = tiny_model.lm_head.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape)))
    assert teacher_forced_hits(tiny_model, bpe, rows, 2) == expected
    hook.remove()
    assert shapes == [(2, 6, 128), (2, 4, 128), (1, 2, 128)]  # B, longest graded + 1, V
    assert all(hit[0] for hit in expected) and not all(all(hit) for hit in expected)


@pytest.mark.parametrize(("wrong", "share"), [(0, 1.0), (1, None)])
def test_share_counts_the_answer_in_the_final_channel(
    tiny_config: Callable[..., object], bpe: PreTrainedTokenizerFast, wrong: int, share: float | None
) -> None:
    """A model whose every next token is forced to the reference, but for `wrong` answer tokens."""
    model = GptOssForCausalLM(tiny_config(vocab_size=600)).eval()
    evaluation = accuracy([VariableChain()], context_tokens=300, problems_per_effort=1, mode="teacher_forced")
    ((problem, effort),) = items = evaluation.items(bpe)
    prompt = bpe(render_prompt(bpe, problem, effort), add_special_tokens=False)["input_ids"]
    head = bpe("<|channel|>final<|message|>", add_special_tokens=False)["input_ids"]
    answer = bpe(problem.answer, add_special_tokens=False)["input_ids"]
    sequence = prompt + head + answer

    def force(_module: object, _arguments: object, output: Tensor) -> Tensor:
        kept = output.shape[1]
        following = torch.tensor([*sequence[1:], 0][-kept:])
        following[-2:-1] = (following[-2:-1] + wrong) % 600  # the guess of the answer's last token
        return torch.nn.functional.one_hot(following, 600).float()[None]

    model.lm_head.register_forward_hook(force)
    expected = share if share is not None else (len(answer) - 1) / len(answer)
    assert evaluation.scores(model, bpe, items) == [pytest.approx(expected)]
    exact = accuracy(
        [VariableChain()], context_tokens=300, problems_per_effort=1, mode="teacher_forced", credit="exact"
    )
    assert exact.scores(model, bpe, items) == [float(wrong == 0)]


def test_bad_input_is_refused(tiny_model: GptOssForCausalLM, bpe: PreTrainedTokenizerFast) -> None:
    for arguments, message in (
        ({}, "context_tokens is missing"),
        ({"tasks": [Retrieval(), Retrieval()], "context_tokens": 400}, "names must differ"),
        ({"tasks": [], "environments": []}, "at least one is needed"),
        ({"context_tokens": 400, "mode": "greedy"}, "mode is 'greedy'; allowed"),
        ({"context_tokens": 400, "credit": "half"}, "credit is 'half'; allowed"),
        ({"context_tokens": 400, "problems_per_effort": 0}, "1 or more is needed"),
        ({"context_tokens": 0}, "1 or more is needed"),
        ({"context_tokens": 400, "efforts": ["extreme"]}, "extreme"),
        ({"context_tokens": 400, "batch_size": 0}, "batch_size 0"),
    ):
        with pytest.raises(ValueError, match=message):
            accuracy(**arguments)
    with pytest.raises(ValueError, match="the needles and the question alone are"):
        accuracy(context_tokens=60).items(bpe)
    tokenizer = AutoTokenizer.from_pretrained(PARENT)
    with pytest.raises(ValueError, match="model_max_length is 131072"):
        accuracy(context_tokens=131073).items(tokenizer)


@pytest.mark.parametrize("mode", ["generated", "teacher_forced"])
def test_a_prompt_longer_than_the_models_context_is_refused_before_anything_runs(
    tiny_model: GptOssForCausalLM, bpe: PreTrainedTokenizerFast, mode: str
) -> None:
    evaluation = accuracy([Retrieval()], context_tokens=300, problems_per_effort=2, mode=mode)
    items = evaluation.items(bpe)
    tiny_model.config.max_position_embeddings = 302
    tiny_model.model = None  # a forward pass would fail in another way
    with pytest.raises(ValueError, match=r"the model's context holds 302 .*max_position_embeddings"):
        evaluation.scores(tiny_model, bpe, items)


def test_items_of_other_environments_are_refused(tiny_model: GptOssForCausalLM, bpe: PreTrainedTokenizerFast) -> None:
    items = accuracy([Retrieval("other")], context_tokens=300, problems_per_effort=1).items(bpe)
    for mode in ("generated", "teacher_forced"):
        with pytest.raises(ValueError, match=r"\['other'\]"):
            accuracy([Retrieval()], context_tokens=300, mode=mode).scores(tiny_model, bpe, items)


def test_recipes_name_it_by_class_path(bpe: PreTrainedTokenizerFast) -> None:
    parser = ArgumentParser()
    parser.add_argument("--evaluations", type=list[Evaluation])
    problems = {
        "context_tokens": 400,
        "problems_per_effort": 2,
        "tasks": [
            {"class_path": "lit_puzzle.environments.long_context_tasks.VariableChain", "init_args": {"hops": 2}},
            {"class_path": "lit_puzzle.environments.long_context_tasks.FrequentWord"},
        ],
        "environments": [{"class_path": "lit_puzzle.tiny.world.Chains"}],
    }
    settings = {"problems": problems, "grading": {"mode": "teacher_forced"}}
    source = [{"class_path": "lit_puzzle.evaluate.long_context.LongContextAccuracy", "init_args": settings}]
    (evaluation,) = parser.instantiate(parser.parse_object({"evaluations": source})).evaluations
    assert evaluation.name == "long_context"
    assert [problem.environment for problem, _ in evaluation.items(bpe)] == ["variable_chain", "frequent_word"]
