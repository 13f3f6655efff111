"""Inputs that are replaced between a kill and the same command again: refused, with what differs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from faults.case import Trials
from faults.cases.prompts import ROWS, words
from faults.damage import Damage, edit, lines, replace, tensors
from faults.interruptions import Interruptions, last_result


def other_weights(folder: str) -> Damage:
    """A checkpoint whose weights are a little different, as of another training."""

    def change(content: dict[str, torch.Tensor]) -> None:
        content["model.layers.3.self_attn.o_proj.weight"] *= 1.25

    return tensors(f"{folder}/model.safetensors", change)


def other_template(folder: str) -> Damage:
    """A checkpoint that renders prompts another way."""
    return replace(f"{folder}/chat_template.jinja", "Reasoning: ", "Effort: ")


def swapped_token(folder: str) -> Damage:
    """A tokenizer in which two letters have changed places."""

    def apply(root: Path) -> None:
        content = (root / folder / "tokenizer.json").read_text()
        first, second = '"a":', '"b":'
        swapped = content.replace(first, '"@":').replace(second, first).replace('"@":', second)
        assert swapped != content
        (root / folder / "tokenizer.json").write_text(swapped)

    return apply


def other_scores() -> Damage:
    """Scores of another run."""
    return edit("runs/score/scores.json", {"entries.0.metrics.kl.mean": 0.5})


REPLACED: dict[str, tuple[str, Callable[[], Damage], tuple[str, ...]]] = {
    "generate: parent": ("generate", lambda: other_weights("parent"), ("parent",)),
    "generate: template": ("generate", lambda: other_template("parent"), ("template",)),
    "generate: tokenizer": ("generate", lambda: swapped_token("parent"), ("tokenizer",)),
    "importance: parent": ("importance", lambda: other_weights("parent"), ("parent",)),
    "score: parent": ("score", lambda: other_weights("parent"), ("parent",)),
    "search: scores": ("search", other_scores, ("scores",)),
    "assemble: parent": ("assemble", lambda: other_weights("parent"), ("parent",)),
    "precompute_logits: parent": ("precompute_logits", lambda: other_weights("parent"), ("parent",)),
    "distill: child": ("distill", lambda: other_weights("child"), ("child",)),
    "distill: parent": ("distill", lambda: other_weights("parent"), ("parent",)),
    "distill_blocks: parent": ("distill_blocks", lambda: other_weights("parent"), ("parent",)),
    "rl_recover: child": ("rl_recover", lambda: other_weights("child"), ("child",)),
    "rl_recover: template": ("rl_recover", lambda: other_template("child"), ("template",)),
    "calibrate_kv: child": ("calibrate_kv", lambda: other_weights("child"), ("child|checkpoint",)),
    "export: child": ("export", lambda: other_weights("child"), ("child|checkpoint",)),
    "evaluate: child": ("evaluate", lambda: other_weights("child"), ("child|checkpoint",)),
    "evaluate: template": ("evaluate", lambda: other_template("child"), ("template",)),
}


@pytest.fixture(scope="module")
def interruptions(trials: Trials) -> Interruptions:
    return Interruptions(trials)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_input_is_refused_when_a_run_resumes(interruptions: Interruptions, name: str) -> None:
    stage, damage, said = REPLACED[name]
    assert interruptions.replaced(stage, damage(), *said) == ""


@pytest.mark.slow
def test_replaced_prompts_are_refused_when_a_run_resumes(interruptions: Interruptions) -> None:
    more, good = words("prompts.jsonl"), lines("prompts.jsonl", *ROWS)
    whole = interruptions.run("generate", interruptions.folder("generate", good), *more)
    folder = interruptions.folder("generate", good)
    end = interruptions.run("generate", folder, *more, kill_before_change=last_result(whole.changes))
    assert end.status < 0, end.said
    lines("prompts.jsonl", *reversed(ROWS))(folder)
    end = interruptions.run("generate", folder, *more)
    assert (end.status, "prompts" in end.said, end.has_traceback) == (2, True, False), end.said
    good(folder)
    end = interruptions.run("generate", folder, *more)
    assert end.status == 0, end.said
