"""A real vLLM draws the tokens that transformers draws, and says clearly that it died.

The expected completions are those of `TransformersEngine`, which tests/generation/test_transformers_engine.py holds to
transformers' own `generate`. Everything is float32.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.vllm_environment import ROOT, needs_vllm, output_of, start_in_vllm
from pyarrow.parquet import read_table

from lit_puzzle.generation.draws import restrict_to_top_p, uniforms
from lit_puzzle.generation.engine import Completion
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.generation.vllm_engine import load_vllm

PARENT = ROOT / "lit_puzzle" / "assets" / "tiny_parent"
HELPERS = ROOT / "tests" / "helpers"
GREEDY = Sampling(40, temperature=0.0, logprobs=True)
SAMPLED = Sampling(40, temperature=1.0, seed=3, logprobs=True)
NUCLEUS = Sampling(40, temperature=0.8, top_p=0.9, seed=2**64 - 1)
NAMES = ("vllm", "transformers")
RECIPE = ROOT / "recipes" / "generate.yaml"
EDGE = 1e-5  # how close to an edge between two tokens rounding of the logits may decide
CROWDED = {  # prompts are read in parts, and running requests lose their KV cache to others
    "max_model_len": 160,
    "max_num_batched_tokens": 128,
    "kv_cache_memory_bytes": 2**23,
    "block_size": 32,
}


def some_prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(128) for _ in range(rng.randint(5, 90))] for _ in range(300)]


PROMPTS = some_prompts()


@pytest.fixture(scope="module")
def transformers() -> TransformersEngine:
    return TransformersEngine(*load_policy(PARENT, "float32"), batch_size=64)


@pytest.fixture(scope="module")
def expected(transformers: TransformersEngine) -> dict[Sampling, list[Completion]]:
    return {sampling: transformers.generate(PROMPTS, sampling) for sampling in (GREEDY, SAMPLED, NUCLEUS)}


class Found(NamedTuple):
    """What vllm_completions.py wrote."""

    calls: list[list[Completion]]
    preempted: int
    before: int
    after: int


def by_vllm(folder: Path, calls: Sequence[tuple[Sampling, Sequence[int]]], **options: Any) -> Found:
    """Completions of one engine for each call: sampling, and the numbers of its prompts."""
    written = [{"prompts": [PROMPTS[row] for row in rows], "sampling": asdict(s), "rows": rows} for s, rows in calls]
    options = {"enforce_eager": True, **options}
    (folder / "job.json").write_text(json.dumps({"checkpoint": str(PARENT), "options": options, "calls": written}))
    output_of(start_in_vllm(HELPERS / "vllm_completions.py", folder / "job.json", folder / "completions.json"))
    found = json.loads((folder / "completions.json").read_text())
    return Found(**found | {"calls": [[Completion(*completion) for completion in call] for call in found["calls"]]})


def check_same(
    found: Sequence[Completion], expected: Sequence[Completion], transformers: TransformersEngine, sampling: Sampling
) -> None:
    """Assert equal tokens and endings, except in at most three rows that rounding explains."""
    pairs = list(zip(found, expected, strict=True))
    differing = [row for row, (one, other) in enumerate(pairs) if one.token_ids != other.token_ids]
    assert len(differing) <= 3
    for row in differing:
        one, other = (completion.token_ids for completion in pairs[row])
        position = next(place for place in range(len(one)) if one[place] != other[place])
        assert distance_to_edge(transformers, other[:position], row, sampling) < EDGE
    assert all(one.finish == other.finish for row, (one, other) in enumerate(pairs) if row not in differing)


def distance_to_edge(engine: TransformersEngine, before: list[int], row: int, sampling: Sampling) -> float:
    """How far a draw is from giving another token, by the probabilities of one whole forward pass."""
    with torch.no_grad():
        logits_V = engine.model(torch.tensor([PROMPTS[row] + before])).logits[0, -1].double()
    if sampling.temperature == 0:
        best = logits_V.topk(2).values
        return float(best[0] - best[1])
    probs_V = (logits_V / sampling.temperature).softmax(-1)
    sums_V = probs_V.sort(descending=True).values.cumsum(-1)
    kept_V = restrict_to_top_p(probs_V[None], sampling.top_p)[0] if sampling.top_p < 1 else probs_V
    uniform = uniforms(sampling.seed, row, len(before), 1)[0]
    edges_V = kept_V.cumsum(-1) / kept_V.sum()
    return float(torch.minimum((edges_V - uniform).abs().min(), (sums_V - sampling.top_p).abs().min()))


@needs_vllm
def test_tokens_and_log_probabilities_are_those_of_transformers(
    tmp_path: Path, transformers: TransformersEngine, expected: dict[Sampling, list[Completion]]
) -> None:
    """300 prompts at once; and half of them in another order are completed as before."""
    some = random.Random(1).sample(range(300), 150)
    calls = [(sampling, range(300)) for sampling in expected]
    found = by_vllm(tmp_path, [(s, list(rows)) for s, rows in calls] + [(NUCLEUS, some)]).calls
    for sampling, completions in zip(expected, found, strict=False):
        check_same(completions, expected[sampling], transformers, sampling)
    assert len({c.finish for c in found[1]}) == 2 and found[1] != found[0]
    assert sum(one != other for one, other in zip(found[3], [found[2][row] for row in some], strict=True)) <= 1
    for sampling, completions in zip((GREEDY, SAMPLED), found, strict=False):
        same = [p for p in zip(completions, expected[sampling], strict=True) if p[0].token_ids == p[1].token_ids]
        assert all(one.logprobs == pytest.approx(other.logprobs, abs=1e-4) for one, other in same)
    assert {completion.logprobs for completion in found[2]} == {None}


@needs_vllm
def test_preempted_requests_draw_the_same_tokens(
    tmp_path: Path, transformers: TransformersEngine, expected: dict[Sampling, list[Completion]]
) -> None:
    found = by_vllm(tmp_path, [(SAMPLED, list(range(300)))], **CROWDED)
    assert found.preempted > 0
    check_same(found.calls[0], expected[SAMPLED], transformers, SAMPLED)


@needs_vllm
def test_two_tensor_parallel_processes_draw_the_same_tokens(
    tmp_path: Path, transformers: TransformersEngine, expected: dict[Sampling, list[Completion]]
) -> None:
    found = by_vllm(tmp_path, [(NUCLEUS, list(range(20)))], tensor_parallel_size=2, kv_cache_memory_bytes=2**28)
    check_same(found.calls[0], expected[NUCLEUS][:20], transformers, NUCLEUS)
    assert (found.before, found.after) == (2, 0)  # dropping the engine ends them


@needs_vllm
def test_what_fails_in_vllm_is_one_clear_error(tmp_path: Path) -> None:
    output_of(start_in_vllm(HELPERS / "vllm_failures.py", PARENT, tmp_path / "errors.json"))
    too_long, died, unread, unsent, refused = json.loads((tmp_path / "errors.json").read_text())
    assert too_long.startswith(
        "Prompt 1 has 100 tokens; with max_new_tokens 4000 it exceeds the context of 4096 tokens."
    )
    assert died.startswith("vLLM's engine died while it generated: ") and "run the same command again" in died
    assert unread.startswith("vLLM's engine died while it read weights: ")
    assert unsent == died
    assert refused.startswith(f"vLLM does not start on {PARENT}: ") and "VLLM_CPU_KVCACHE_SPACE=N" in refused
    assert "\n" not in died + refused


@needs_vllm
def test_the_recipe_generates_the_same_documents_with_both_engines(tmp_path: Path) -> None:
    """Compiled and in processes of its own, as users run vLLM; two shards."""
    for name in NAMES:
        words = (f"--engine.name={name}", f"--run_dir={tmp_path / name}", "--prompts.num_prompts=60", "--shard_size=40")
        output_of(start_in_vllm("-m", "lit_puzzle", "run", RECIPE, *words))
    tables = [[read_table(path) for path in sorted((tmp_path / name).glob("documents/*.parquet"))] for name in NAMES]
    assert sum(table.num_rows for table in tables[0]) == 60 and len(tables[0]) == 2
    assert all(one.equals(other) for one, other in zip(*tables, strict=True))


def test_model_runner_v2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=r"VLLM_USE_V2_MODEL_RUNNER=1 is set; .* needs vLLM's Model Runner V1"):
        load_vllm(PARENT, EngineSettings("vllm"))


def test_missing_vllm_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.setitem(sys.modules, "vllm", None)  # makes the import fail as if it were not installed
    with pytest.raises(ValueError, match=r"Engine vllm needs vLLM \(.*\): pip install"):
        load_vllm(PARENT, EngineSettings("vllm"))
