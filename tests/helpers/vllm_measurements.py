"""Runs in vLLM's environment: what scoring and training measure, by vLLM and by transformers, written as JSON.

VENV/bin/python vllm_measurements.py FOLDER

FOLDER/found.json gets, of each engine, `scores` of a long-context evaluation with one block replaced and `episodes`
(effort, grade and length) of `solve_folder` on the tiny child.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from lit_puzzle.environments.environment import Environment
from lit_puzzle.evaluate.before_after import solve_folder
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.evaluate.long_context import LongContextAccuracy
from lit_puzzle.evaluate.long_context_settings import LongContextProblems
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.library.library import parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.scoring.evaluation_run import EvaluationRun
from lit_puzzle.scoring.score_files import Entry, ScoreFiles, Values
from lit_puzzle.serve.vllm.driver import ENVIRONMENT
from lit_puzzle.spec import BlockSpec
from lit_puzzle.tiny.world import Chains, Counting

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
FAMILIES: list[Environment] = [Chains(), Counting()]


def main(folder: Path) -> None:
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name != "TORCHDYNAMO_DISABLE"})
    found: dict[str, Any] = {}
    for name in ("vllm", "transformers"):
        settings = EngineSettings(name)
        found[name] = {"scores": scores(settings, folder), "episodes": episodes(settings)}
    (folder / "found.json").write_text(json.dumps(found))


def scores(settings: EngineSettings, folder: Path) -> Values:
    parent = ASSETS / "tiny_parent"
    tokenizer, own = load_tokenizer(parent), parent_blocks(Checkpoint(parent).config)[1]
    problems = LongContextProblems(environments=FAMILIES, efforts=["low", "high"], problems_per_effort=12)
    task = LongContextAccuracy(problems, sampling=Sampling(64, temperature=0.0), name="far", engine=settings)
    run = EvaluationRun(task, task.items(tokenizer), ScoreFiles(folder / "far"), tokenizer, Fabric(accelerator="cpu"))
    entry = Entry(1, "experts=12,window=24", "pair", BlockSpec(own.experts[2:14], 24), None)
    return run.by_engine(settings, parent, folder, lambda _: {})(entry)


def episodes(settings: EngineSettings) -> list[tuple[str, float, int]]:
    child = ASSETS / "tiny_child"
    problems = held_out_problems(FAMILIES, ["low", "high"], 12, 0)
    solved = solve_folder(settings, child, load_tokenizer(child), problems, FAMILIES, 64)
    return [(episode.effort, episode.correct, episode.generated_tokens) for episode in solved]


if __name__ == "__main__":  # vLLM's processes import this file
    main(Path(sys.argv[1]))
