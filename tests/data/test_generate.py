"""Generated documents: which prompts, which completions, and that sampling follows the seed and the parent."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.by_generate import by_generate
from transformers import GptOssForCausalLM

from lit_puzzle.data.document_files import DocumentFolder
from lit_puzzle.data.generate import generate
from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import draw, is_held_out
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains, Counting


@pytest.fixture(scope="module")
def parent(tiny_config, tmp_path_factory) -> Path:
    """A random model with the tiny world's tokenizer that ends its completions now and then."""
    folder = tmp_path_factory.mktemp("parent")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = GptOssForCausalLM(tiny_config(num_hidden_layers=2, max_position_embeddings=256, **special))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 110)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


GREEDY = Sampling(12, temperature=0.0)
SMALL = EngineSettings("transformers", batch_size=4)


def source(environments: list[Any] | None = None, **settings: Any) -> PromptSource:
    """20 prompts of two environments, unless others or a file are given."""
    defaults: dict[str, Any] = {"num_prompts": 20}
    if "file" not in settings:
        defaults["environments"] = [Chains(), Counting()] if environments is None else environments
    return PromptSource(**(defaults | settings))


def run(
    folder: Path, parent: Path, prompts: PromptSource | None = None, **settings: Any
) -> tuple[dict[str, float], DocumentFolder]:
    folder.mkdir(exist_ok=True)
    defaults: dict[str, Any] = {"sampling": Sampling(12), "engine": SMALL, "shard_size": 8}
    results = generate(folder, parent, prompts or source(), **(defaults | settings))
    return results, DocumentFolder(folder / "documents")


def rows(folder: DocumentFolder) -> list[dict[str, Any]]:
    """All documents, with prompt and completion apart."""
    found = []
    for number in range(folder.num_shards):
        shard = folder.shard(number)
        for d in range(len(shard)):
            span = slice(shard.offsets[d], shard.offsets[d + 1])
            ids, mask = shard.ids_N[span].tolist(), shard.mask_N[span].tolist()
            assert mask == sorted(mask)
            prompt = mask.index(1)
            row = {"environment": shard.environments[d], "effort": shard.efforts[d], "correct": shard.correct[d]}
            found.append({"prompt": ids[:prompt], "completion": ids[prompt:], **row})
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "documents").iterdir())}


def test_greedy_completions_are_the_parents(parent, tmp_path):
    results, folder = run(tmp_path / "a", parent, source(efforts={"low": 1.0, "high": 2.0}), sampling=GREEDY)
    pairs = draw([Chains(), Counting()], {"low": 1.0, "high": 2.0}, 20, 0, held_out=False)
    tokenizer, model = build_tokenizer(), GptOssForCausalLM.from_pretrained(parent, dtype="float32").eval()
    found, finished, tokens = rows(folder), Counter[str](), Counter[str]()
    assert len(found) == len(pairs) == 20 and folder.num_shards == 3
    for row, (problem, effort) in zip(found, pairs, strict=True):
        assert not is_held_out(problem)
        prompt = tokenizer(render_prompt(tokenizer, problem, effort), add_special_tokens=False)["input_ids"]
        expected = by_generate(model, [prompt], 12)[0]
        assert (row["prompt"], row["completion"]) == (prompt, expected.token_ids)
        assert (row["environment"], row["effort"], row["correct"]) == (problem.environment, effort, 0.0)
        finished[effort] += expected.finish == "stop"
        tokens[effort] += len(expected.token_ids)
    count = Counter(effort for _, effort in pairs)
    for effort in ("low", "high"):
        assert results[f"prompts/{effort}"] == results[f"kept/{effort}"] == count[effort]
        assert results[f"finished/{effort}"] == finished[effort] / count[effort]
        assert results[f"tokens/{effort}"] == tokens[effort] / count[effort]
        assert results[f"accuracy/{effort}"] == 0.0
    assert 0 < sum(finished.values()) < 20
    assert results["documents"] == 20 and results["targets"] == sum(tokens.values())


def test_documents_depend_on_the_seed_and_their_number_alone(parent, tmp_path):
    state = torch.get_rng_state()
    _, first = run(tmp_path / "a", parent, sampling=Sampling(12, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    _, other = run(
        tmp_path / "b", parent, sampling=Sampling(12, seed=3), shard_size=3, engine=replace(SMALL, batch_size=64)
    )
    _, fewer = run(tmp_path / "c", parent, source(num_prompts=16), sampling=Sampling(12, seed=3))
    _, reseeded = run(tmp_path / "d", parent, sampling=Sampling(12, seed=4))
    assert [folder.num_shards for folder in (first, other, fewer)] == [3, 7, 2]
    assert rows(first) == rows(other) and rows(first)[:16] == rows(fewer)
    a, c = files(tmp_path / "a"), files(tmp_path / "c")
    assert all(a[f"shard-0000{number}.parquet"] == c[f"shard-0000{number}.parquet"] for number in (0, 1))
    pairs = list(zip(rows(first), rows(reseeded), strict=True))
    assert all(a["prompt"] == b["prompt"] for a, b in pairs) and sum(a != b for a, b in pairs) > 15


def test_the_same_prompt_twice_is_sampled_twice(parent, tmp_path, monkeypatch):
    """Training problems repeat when an environment has no more: their completions differ all the same."""

    class One(Chains):
        def problem(self, rng: random.Random) -> Any:
            return super().problem(random.Random(1))

    monkeypatch.setattr("lit_puzzle.environments.environment.MAX_DRAWS", 3)
    _, folder = run(tmp_path / "a", parent, source([One()], efforts={"low": 1.0}))
    assert len({tuple(row["prompt"]) for row in rows(folder)}) == 1
    assert len({tuple(row["completion"]) for row in rows(folder)}) > 15


def test_settings_are_noted(parent, tmp_path):
    _, _ = run(tmp_path / "a", parent, sampling=Sampling(9, 0.5, 0.9, seed=3), keep="all")
    noted = json.loads((tmp_path / "a" / "documents" / "documents.json").read_text())["settings"]
    assert noted == {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "keep": "all"}


class Lucky(Chains):
    """Calls a completion right when its length is even."""

    def verify(self, final: str, problem_answer: str) -> float:
        return float(len(build_tokenizer()(final, add_special_tokens=False)["input_ids"]) % 2 == 0)


def test_only_right_completions_are_kept(parent, tmp_path):
    lucky = source([Lucky()], answer_format="whole")
    everything, all_documents = run(tmp_path / "a", parent, lucky)
    results, folder = run(tmp_path / "b", parent, lucky, keep="correct")
    right = [row for row in rows(all_documents) if row["correct"] == 1.0]
    assert rows(folder) == right and 0 < len(right) < 20
    for effort in ("low", "medium", "high"):
        assert results[f"accuracy/{effort}"] == everything[f"accuracy/{effort}"]
        assert results[f"kept/{effort}"] == sum(row["effort"] == effort for row in right)
    with pytest.raises(ValueError, match="keep: correct left none of 20 completions"):
        run(tmp_path / "c", parent, keep="correct", sampling=GREEDY)


def write_prompts(folder: Path, count: int = 40) -> list[list[dict[str, str]]]:
    """The same prompts as JSON lines, Parquet and a folder of `datasets`."""
    from datasets import Dataset

    rng = random.Random(0)
    made = [[dict(message) for message in Chains().problem(rng).messages] for _ in range(count)]
    Dataset.from_dict({"messages": made}).save_to_disk(str(folder / "saved"))
    Dataset.from_dict({"messages": made}).to_parquet(str(folder / "prompts.parquet"))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in made))
    return made


def test_prompts_of_a_file_are_asked_unless_they_are_held_out(parent, tmp_path):
    from lit_puzzle.data.prompts import read_prompts

    made = write_prompts(tmp_path)
    held_out = [is_held_out(problem) for problem in read_prompts(tmp_path / "prompts.jsonl")]
    assert 0 < sum(held_out) < 20
    seen = []
    for name in ("prompts.jsonl", "prompts.parquet", "saved"):
        results, folder = run(tmp_path / f"run {name}", parent, source(file=tmp_path / name, num_prompts=None))
        documents = rows(folder)
        assert {row["environment"] for row in documents} == {name.partition(".")[0]}
        assert {row["correct"] for row in documents} == {None} and "accuracy/low" not in results
        seen.append([(row["prompt"], row["completion"]) for row in documents])
    assert seen[0] == seen[1] == seen[2]
    texts = [build_tokenizer().decode(prompt) for prompt, _ in seen[0]]
    for row, out in zip(made, held_out, strict=True):
        assert sum(row[0]["content"] in text for text in texts) == (not out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": []}', r"prompts\.jsonl:1: messages must be a list of objects"),
        ('{"prompt": "a", "messages": []}', r"prompts\.jsonl:1: a row has either prompt or messages"),
        ('{"text": "a"}', r"prompts\.jsonl:1: a row has either prompt or messages, this one \['text'\]"),
        ('{"prompt": "a"', r"prompts\.jsonl:1 is not JSON"),
        ('{"messages": [{"role": "user", "content": 1}]}', "message 1: content must be a text, got '1'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the assistant's"),
        ("", "holds 0 prompts"),
    ],
)
def test_bad_prompts_are_refused(line, message, parent, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", parent, source(file=tmp_path / "prompts.jsonl", num_prompts=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": PromptSource()}, "either a file"),
        ({"prompts": PromptSource([Chains()], Path("x.jsonl"), num_prompts=2)}, "either a file"),
        ({"prompts": source(num_prompts=None)}, "give num_prompts"),
        ({"prompts": source(file=Path("x.jsonl")), "keep": "correct"}, "needs environments"),
        ({"prompts": source(file=Path("missing.jsonl"))}, r"prompts 'missing\.jsonl' does not exist"),
        ({"sampling": Sampling(250)}, r"context - max_new_tokens leaves 6"),
        ({"shard_size": 0}, "shard_size 0"),
        ({"engine": EngineSettings("vllm")}, "needs vLLM"),
        ({"parent": Path("nowhere")}, "nowhere' does not exist"),
    ],
)
def test_bad_arguments_are_refused_before_the_parent_is_loaded(settings, message, parent, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_puzzle.generation.load.load_policy", lambda *_: pytest.fail("the parent was loaded"))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **({"parent": parent} | settings))
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"inputs.json"}


def test_prompts_that_are_too_few(parent, tmp_path):
    write_prompts(tmp_path)
    with pytest.raises(ValueError, match="40 were asked for"):
        run(tmp_path / "run", parent, source(file=tmp_path / "prompts.jsonl", num_prompts=40))
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"holds the splits \['train'\]: name one, .*splits/train"):
        run(tmp_path / "run", parent, source(file=tmp_path / "splits"))


@pytest.mark.parametrize("prompts", [64, 256])
@pytest.mark.slow
def test_disk_is_as_the_formula_says(prompts, parent, tmp_path):
    results, _ = run(tmp_path / "run", parent, source(num_prompts=prompts), shard_size=64, sampling=Sampling(8))
    size = sum(len(content) for name, content in files(tmp_path / "run").items() if name.endswith(".parquet"))
    assert size < 5 * results["tokens"] + 2**16 * results["shards"]
