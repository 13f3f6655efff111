"""harness_task.py: prompts and grades of lm-evaluation-harness, compared with its own run; what is refused."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval", reason="pip install 'lit-puzzle[lm-eval]'")
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.tasks import TaskManager

from lit_puzzle.environments.environment import draw
from lit_puzzle.environments.harness_task import HarnessTask
from lit_puzzle.environments.problem_identity import problems_identity
from lit_puzzle.evaluate.accuracy import evaluate, read_episodes
from lit_puzzle.evaluate.alike import check_alike
from lit_puzzle.evaluate.held_out import HeldOut
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.run.inputs import claim_inputs, run_date

FINALS = ["the answer is 1.", "4", "no idea", "10\nQuestion: 3", "Question: 13", "16", "19 or so", "2"]
SUMS: dict[str, Any] = {
    "task": "little_sums",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "fewshot_split": "train",
    "description": "Add the numbers.",
    "doc_to_text": "What is {{a}} + {{b}}?",
    "doc_to_target": "{{a + b}}",
    "num_fewshot": 2,
    "generation_kwargs": {"until": ["\n", "Question:"]},
    "filter_list": [
        {
            "name": "number",
            "filter": [{"function": "regex", "regex_pattern": "(-?[0-9]+)"}, {"function": "take_first"}],
        },
        {"name": "whole", "filter": [{"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}, {"metric": "bleu"}],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks on files that are made here; `datasets` caches beside it and asks no hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # for the process that grades
    rows = {"test": [{"a": n, "b": 2 * n + 1} for n in range(8)], "train": [{"a": n, "b": 1} for n in range(3)]}
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    write_task(tmp_path, {})
    return tmp_path


def write_task(folder: Path, changes: dict[str, Any]) -> None:
    data = {"dataset_kwargs": {"data_files": {name: str(folder / f"{name}.jsonl") for name in ("test", "train")}}}
    content = SUMS | data | changes
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / f"{content['task']}.yaml").write_text(yaml.safe_dump(content))


class Recorded(LM):
    """A model of the harness that answers with `FINALS` in order and keeps what it was asked."""

    tokenizer_name = "recorded"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked = [request.args[0] for request in requests]
        texts = []
        for text, request in zip(FINALS, requests, strict=True):
            for stop in handle_stop_sequences(request.args[1]["until"], None):
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return json.dumps(chat_history)

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("until", [["\n", "Question:"], "Question:"])
def test_prompts_and_grades_are_those_of_the_harness(folder: Path, until: str | list[str]) -> None:
    """Against `simple_evaluate` on the same task file, with a model of the harness that gives the same texts."""
    write_task(folder, {"generation_kwargs": {"until": until}})
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    model, quiet = Recorded(), {"bootstrap_iters": 0, "fewshot_random_seed": 3}
    found = simple_evaluate(
        model, tasks=["little_sums"], task_manager=manager, apply_chat_template=True, log_samples=True, **quiet
    )
    task = HarnessTask("little_sums", include=folder / "tasks", seed=3)
    assert [list(problem.messages) for problem in task.problems] == [json.loads(text) for text in model.asked]
    roles = [message["role"] for message in task.problems[0].messages]
    assert roles == ["system", *["user", "assistant"] * 2, "user"]
    answers = [problem.answer.partition(" (exact_match, number, lm-eval ")[0] for problem in task.problems]
    assert answers == [f"{n}: {3 * n + 1}" for n in range(8)]
    for name in ("number", "whole"):
        theirs = [row["exact_match"] for row in found["samples"]["little_sums"] if row["filter"] == name]
        chosen = HarnessTask("little_sums", include=folder / "tasks", filter=name)
        ours = [chosen.verify(text, problem.answer) for text, problem in zip(FINALS, chosen.problems, strict=True)]
        assert ours == theirs and 0 < sum(ours) < 8
        apart = chosen.verify_all(FINALS, [problem.answer for problem in chosen.problems])
        assert [verdict.correct for verdict in apart] == ours
        assert sum(ours) / 8 == found["results"]["little_sums"][f"exact_match,{name}"]


def test_a_text_that_holds_the_task_up_is_counted_and_the_others_are_graded(folder: Path) -> None:
    """A pattern of the task's that backtracks without end: the same text in this process would never return."""
    slow = {"function": "regex", "regex_pattern": "^([0-9]+)+$"}
    write_task(folder, {"filter_list": [{"name": "slow", "filter": [slow, {"function": "take_first"}]}]})
    task = HarnessTask("little_sums", include=folder / "tasks", seconds=2.0)
    answers = [task.problems[place].answer for place in (0, 1, 1, 2)]
    verdicts = task.verify_all(["1", "1" * 60 + "?", "4", "8"], answers)
    assert [verdict.correct for verdict in verdicts] == [1.0, 0.0, 1.0, 0.0]
    assert [verdict.failed for verdict in verdicts] == [False, True, False, False]
    assert verdicts[1].reason == "grader failed: lm-eval: no verdict within 2 s"


def test_every_problem_is_measured_and_none_trained_on(folder: Path) -> None:
    task = HarnessTask("little_sums", name="sums", include=folder / "tasks", num_fewshot=0)
    drawn = draw([task], ["none"], 8, 0, held_out=True)
    assert {problem.answer for problem, _ in drawn} == {problem.answer for problem in task.problems}
    assert drawn == draw([task], ["none"], 8, 0, held_out=True) != draw([task], ["none"], 8, 1, held_out=True)
    assert task.problem(random.Random(0)).environment == "sums" and len(task.problems[0].messages) == 2
    with pytest.raises(ValueError, match="sums has fewer problems that differ than were asked for"):
        draw([task], ["none"], 9, 0, held_out=True)
    with pytest.raises(ValueError, match="sums was given as a source of prompts for training; its problems"):
        draw([task], ["none"], 2, 0, held_out=False)


def test_another_way_to_grade_is_not_compared(folder: Path) -> None:
    """By another filter of the task, and by a file beside the task that was edited."""
    (folder / "tasks" / "helpers.py").write_text("LENIENT = False\n")
    task = partial(HarnessTask, "little_sums", include=folder / "tasks")
    asked = [problems_identity("", [(problem, "low") for problem in each.problems]) for each in (task(), task())]
    assert asked[0] == asked[1]
    run_date(folder / "run")
    claim_inputs(folder / "run", {"held_out": asked[0]})
    check_alike({"before": folder / "run", "now": folder / "other"}, asked[1])
    other = task(filter="whole")
    (folder / "tasks" / "helpers.py").write_text("LENIENT = True\n")
    for changed in (other, task()):
        identity = problems_identity("", [(problem, "low") for problem in changed.problems])
        with pytest.raises(ValueError, match="have other problems, right answers or graders"):
            check_alike({"before": folder / "run", "now": folder / "other"}, identity)


def test_a_task_file_that_is_no_yaml_is_named(folder: Path) -> None:
    (folder / "tasks" / "damaged.yaml").write_text("task: [little_sums\n")
    with pytest.raises(ValueError, match=r"damaged\.yaml is no YAML"):
        HarnessTask("little_sums", include=folder / "tasks")


def test_an_evaluation_writes_rows_of_the_task(folder: Path) -> None:
    """The tiny parent knows no sums, but its completions are graded: the first number of the final text."""
    write_task(folder, {"task": "copies", "doc_to_text": "2 + {{a}} =", "num_fewshot": 0, "description": ""})
    held_out = HeldOut([HarnessTask("copies", include=folder / "tasks")], ["low", "high"], 8)
    parent = PACKAGE / "assets" / "tiny_parent"
    (folder / "run").mkdir()
    results = evaluate(folder / "run", parent, held_out, Sampling(16, 0.0), EngineSettings("transformers"))
    episodes = read_episodes(folder / "run")
    assert len(episodes) == 16 and {episode.environment for episode in episodes} == {"copies"}
    assert all(episode.correct in (0, 1) and episode.request.prompt_tokens for episode in episodes)
    assert results["accuracy/low"] == sum(episode.correct for episode in episodes if episode.effort == "low") / 8


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"output_type": "loglikelihood"}, {}, "its requests are loglikelihood, which compare log-likelihoods"),
        (
            {"output_type": "multiple_choice", "doc_to_choice": ["1", "2"]},
            {},
            "its requests are multiple_choice, which compare",
        ),
        ({"unsafe_code": True}, {}, "it runs what the model writes, outside a sandbox"),
        ({"gen_prefix": "The answer is"}, {}, "the task begins the answer itself"),
        ({}, {"metric": "bleu"}, "the metric bleu of a problem is .* a number from 0 to 1 is needed"),
        (
            {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": False}]},
            {},
            "the task says of its metric exact_match that lower is better",
        ),
        ({}, {"metric": "f1"}, "metric f1 was given; the task has exact_match, bleu"),
        ({}, {"num_fewshot": -1}, "num_fewshot -1 was given; 0 is the least"),
        ({}, {"filter": "last"}, "filter last was given; the task has number, whole"),
        ({"doc_to_text": "{{a"}, {}, "the task little_sums of lm-eval cannot be used: TemplateSyntaxError"),
    ],
)
def test_what_is_refused_is_one_line(folder: Path, changes: Any, arguments: Any, message: str) -> None:
    write_task(folder, changes)
    with pytest.raises(ValueError, match=message) as error:
        HarnessTask("little_sums", include=folder / "tasks", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.slow  # reads the names of all tasks of the harness
def test_unknown_names_and_groups(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"lm-eval: no_such_task is not known\. `lm_eval --tasks list` prints"):
        HarnessTask("no_such_task", include=folder / "tasks")
    with pytest.raises(ValueError, match=r"include .*none is no folder"):
        HarnessTask("little_sums", include=folder / "none")
