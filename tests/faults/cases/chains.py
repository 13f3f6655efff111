"""Results of one stage that the next reads: importance, library, scores, plans, evaluations."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from faults.case import NOTHING, Case, Right, refused
from faults.damage import DROP, Damage, all_of, copy, cut, edit, remove, replace, table, tensors, write

IMPORTANCE = "runs/importance/importance"
LIBRARY, SCORES, PLAN = "runs/library/library.json", "runs/score/scores.json", "runs/search/plan.json"
ANOTHER = '{"layer": 0, "candidate": "experts=8", "metrics": {"kl": {"mean": 0.0, "standard_error": 0.0}}}'
EPISODES = "runs/evaluate/episodes.parquet"
OLDER = "runs/evaluate/episodes.jsonl"


def of_importance(value: float) -> Damage:
    """Return the damage of one score of an expert."""

    def change(content: dict[str, torch.Tensor]) -> None:
        next(iter(content.values())).view(-1)[2] = value

    return tensors(IMPORTANCE + ".safetensors", change)


def case(stage: str, name: str, damage: Damage, *words: str, needs: tuple[str, ...] = ()) -> Case:
    """Return a case of refused results of an earlier stage."""
    return Case(f"{stage}: {name}", "lead", stage, damage, refused(*words), needs=needs)


def other_experts(folder: Path) -> None:
    """Keep other experts in every candidate of the library, under the same names."""
    content = json.loads((folder / LIBRARY).read_text())
    for layer in content["layers"]:
        for candidate in layer[1:]:
            count = len(candidate["block"]["experts"])
            candidate["block"]["experts"] = list(range(16 - count, 16))
    write(LIBRARY, json.dumps(content))(folder)


def compared(name: str, damage: Damage, *words: str) -> Case:
    """Return a case of a refused evaluation to compare with."""
    return Case(
        f"baseline: {name}",
        "prompts",
        "evaluate",
        damage,
        refused(*words),
        ("--baseline=runs/evaluate",),
        ("runs/evaluate",),
    )


def other_problem(row: dict[str, Any]) -> dict[str, Any]:
    """Return a completion of another problem."""
    return row | {"problem": row["problem"] + 1}


def of_kl(value: object) -> Damage:
    """Return the damage of one score."""
    return edit(SCORES, {"entries.2.metrics.kl.mean": value})


CASES = [
    case("search", "scores of another library with the same names", other_experts, "runs/score", "another library"),
    Case(
        "assemble: plan of another library with the same names",
        "lead",
        "assemble",
        other_experts,
        refused("runs/library", "the plan was searched in"),
        ("--library=runs/library",),
        ("runs/library",),
    ),
    case(
        "distill",
        "a child that was made from another parent",
        edit("child/plan.json", {"parent_fingerprint": "0" * 64}),
        "child/plan.json",
        "parent",
    ),
    case("distill", "a cut plan of the child", cut("child/plan.json", 0.5), "child/plan.json"),
    Case(
        "importance: data of another folder than the parent's",
        "lead",
        "importance",
        copy("parent", "other"),
        refused("name the same folder"),
        ("--model.init_args.parent=other",),
        words_are_wrong=True,
    ),
    *(
        Case(
            f"{stage}: {word}", "lead", stage, NOTHING, refused(folder, said), (word,), (folder,), words_are_wrong=True
        )
        for stage, word, folder, said in (
            ("evaluate", "--checkpoint=runs/search", "runs/search", "config.json"),
            ("search", "--library=runs/importance", "runs/importance", "library.json"),
            ("library", "--importance=runs/generate", "runs/generate", "importance.json"),
            ("assemble", "--plan=runs/importance", "runs/importance", "plan"),
            ("distill", "--data.init_args.documents=runs/importance", "runs/importance", "documents.json"),
            ("export", "--kv_scales=runs/generate", "runs/generate", "kv_scales.json"),
            ("export", "--adapter=runs/generate", "runs/generate", "adapter_config.json"),
            ("evaluate", "--baseline=runs/generate", "runs/generate", "episodes.parquet"),
        )
    ),
    *(
        case("library", f"importance with {label}", of_importance(value), "importance")
        for label, value in (("NaN", float("nan")), ("a negative score", -1.0), ("infinity", float("inf")))
    ),
    case(
        "library",
        "importance of another parent",
        edit(IMPORTANCE + ".json", {"fingerprint": "0" * 64}),
        "importance",
        "parent|fingerprint",
    ),
    case("library", "importance of five layers", edit(IMPORTANCE + ".json", {"num_experts": [16] * 5}), "importance"),
    case("library", "importance of 15 experts", edit(IMPORTANCE + ".json", {"num_experts": [15] * 6}), "importance"),
    case("library", "importance: cut record", cut(IMPORTANCE + ".json", 0.5), "importance.json|runs/importance"),
    case("library", "importance: no scores", remove(IMPORTANCE + ".safetensors"), "importance.safetensors"),
    case(
        "library",
        "importance: cut scores",
        cut(IMPORTANCE + ".safetensors", 0.5),
        "importance.safetensors|runs/importance",
    ),
    case("library", "importance: an unfinished run", remove("runs/importance/run.json"), "runs/importance", "complete"),
    case(
        "library",
        "importance: negative tokens",
        edit(IMPORTANCE + ".json", {"tokens": -5}),
        "importance.json|runs/importance",
        "tokens",
    ),
    *(
        case(stage, "library of another parent", edit(LIBRARY, {"parent_fingerprint": "0" * 64}), "library|parent")
        for stage in ("score", "search", "distill_blocks")
    ),
    *(
        case(stage, "library: cut", cut(LIBRARY, 0.5), "library.json")
        for stage in ("score", "search", "distill_blocks")
    ),
    case("search", "library: missing", remove("runs/library"), "runs/library"),
    case("search", "library: a list", write(LIBRARY, "[]"), "library.json"),
    case("search", "library: unknown key", edit(LIBRARY, {"blokcs": 1}), "library.json|blokcs", "blokcs"),
    case(
        "search",
        "library: a key twice",
        replace(LIBRARY, '"num_parent_experts"', '"num_parent_experts": 16, "num_parent_experts"'),
        "library.json",
        "num_parent_experts",
    ),
    case(
        "score",
        "library: the number of experts of the parent",
        edit(LIBRARY, {"num_parent_experts": 15}),
        "library|experts",
    ),
    *(
        case("search", f"scores with {label}", of_kl(value), "scores.json|runs/score", "kl|JSON")
        for label, value in (("NaN", float("nan")), ("infinity", float("inf")), ("a text", "low"), ("null", None))
    ),
    case("search", "scores with a negative KL", of_kl(-0.5), "scores.json|runs/score", "kl"),
    Case(
        "search: scores with a count of 400 digits, which the search does not read",
        "lead",
        "search",
        replace(SCORES, '"samples": 6', '"samples": ' + "9" * 400),
        (Right(), refused("scores.json|runs/score", "samples")),
    ),
    case(
        "search",
        "scores: negative error",
        edit(SCORES, {"entries.2.metrics.kl.standard_error": -1.0}),
        "scores.json|runs/score",
        "standard_error|kl",
    ),
    case("search", "scores: an entry is missing", edit(SCORES, {"entries.2": DROP}), "scores|score"),
    case("search", "scores: a layer that does not exist", edit(SCORES, {"entries.2.layer": 77}), "77"),
    case("search", "scores: an unknown candidate", edit(SCORES, {"entries.2.candidate": "experts=3"}), "experts=3"),
    case("search", "scores of another parent", edit(SCORES, {"parent_fingerprint": "0" * 64}), "score", "parent"),
    case("search", "scores: cut", cut(SCORES, 0.5), "scores.json"),
    case("search", "scores: missing", remove("runs/score"), "runs/score"),
    case(
        "search",
        "scores: an entry twice",
        replace(
            SCORES,
            '"entries": [',
            f'"entries": [{ANOTHER},',
        ),
        "experts=8",
    ),
    case("search", "scores: an unfinished run", remove("runs/score/run.json"), "runs/score", "complete"),
    case("search", "scores: the metric is missing", edit(SCORES, {"entries.2.metrics.kl": DROP}), "kl"),
    case("assemble", "plan of another parent", edit(PLAN, {"plan.parent_fingerprint": "0" * 64}), "plan", "parent"),
    case("assemble", "plan: cut", cut(PLAN, 0.5), "plan.json"),
    case("assemble", "plan: five layers", edit(PLAN, {"plan.blocks.5": DROP}), "plan|layers"),
    case("assemble", "plan: an expert that does not exist", edit(PLAN, {"plan.blocks.1.experts": [0, 16]}), "16"),
    case("assemble", "plan: an expert twice", edit(PLAN, {"plan.blocks.1.experts": [3, 3]}), "experts"),
    case("assemble", "plan: a negative expert", edit(PLAN, {"plan.blocks.1.experts": [-1, 3]}), "-1"),
    case("assemble", "plan: no experts", edit(PLAN, {"plan.blocks.1.experts": []}), "experts"),
    case("assemble", "plan: experts as text", edit(PLAN, {"plan.blocks.1.experts": "all"}), "plan.json", "expert"),
    case("assemble", "plan: a window of nothing", edit(PLAN, {"plan.blocks.1.window_tokens": 0}), "window_tokens"),
    case(
        "assemble", "plan: a wider window than the parent's", edit(PLAN, {"plan.blocks.0.window_tokens": 99}), "window"
    ),
    case("assemble", "plan: a list", write(PLAN, "[]"), "plan.json"),
    case("assemble", "plan: an unknown key", edit(PLAN, {"plan.bocks": []}), "bocks"),
    case("assemble", "plan: missing", remove("runs/search/plan.json"), "plan.json"),
    Case(
        "assemble: the folder of the search's run as plan",
        "lead",
        "assemble",
        NOTHING,
        Right(words=()),
        ("--plan=runs/search",),
    ),
    Case(
        "score: the file of the library",
        "lead",
        "score",
        NOTHING,
        Right(words=()),
        ("--library=runs/library/library.json",),
    ),
    Case(
        "search: the files of library and scores",
        "lead",
        "search",
        NOTHING,
        Right(words=()),
        ("--library=runs/library/library.json", "--scores=runs/score/scores.json"),
    ),
    Case(
        "precompute_logits: the folder of the run that generated",
        "prompts",
        "precompute_logits",
        NOTHING,
        Right(words=()),
        ("--documents=runs/generate",),
    ),
    Case(
        "evaluate: the folder of the run that exported",
        "prompts",
        "evaluate",
        NOTHING,
        Right(words=("--checkpoint=runs/export/model",)),
        ("--checkpoint=runs/export",),
        ("runs/export",),
    ),
    compared("missing", remove("runs/evaluate"), "runs/evaluate"),
    compared("cut", cut(EPISODES, 0.5), "episodes.parquet"),
    compared("other problems", table(EPISODES, other_problem), "runs/evaluate|problems"),
    compared("a row that is a number", write(EPISODES, "7\n"), "episodes.parquet"),
    compared("an unknown key", table(EPISODES, lambda row: row | {"problme": 1}), "episodes.parquet", "problme"),
    compared("NaN", table(EPISODES, lambda row: row | {"correct": math.nan}), "episodes.parquet", "correct"),
    compared("empty", write(EPISODES, ""), "episodes.parquet|runs/evaluate"),
    compared("of an older version", all_of(copy(EPISODES, OLDER), remove(EPISODES)), "episodes.parquet"),
    compared("an unfinished run", remove("runs/evaluate/run.json"), "runs/evaluate", "complete"),
]
