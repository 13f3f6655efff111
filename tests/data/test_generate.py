"""Parent-written documents: what is asked, what is written, and that sampling follows the seed and the parent."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssForCausalLM

from lit_puzzle.data.document_files import DocumentFolder
from lit_puzzle.data.generate import generate, shard_seed
from lit_puzzle.environments.environment import draw, is_held_out, render_prompt
from lit_puzzle.generation.batches import generate_greedily
from lit_puzzle.generation.engines import sample_in_batches
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains, Counting


@pytest.fixture(scope="module")
def parent(tiny_config, tmp_path_factory) -> Path:
    """A random model with the tiny world's tokenizer that ends its answers now and then."""
    folder = tmp_path_factory.mktemp("parent")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = GptOssForCausalLM(tiny_config(num_hidden_layers=2, max_position_embeddings=256, **special))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 110)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(folder: Path, parent: Path, **settings: Any) -> tuple[dict[str, float], DocumentFolder]:
    folder.mkdir(exist_ok=True)
    defaults: dict[str, Any] = {"num_prompts": 20, "max_new_tokens": 12, "shard_size": 8, "batch_size": 4}
    defaults |= {"engine": "transformers"}
    if "prompts" not in settings:
        defaults |= {"environments": [Chains(), Counting()]}
    results = generate(folder, parent, **(defaults | settings))
    return results, DocumentFolder(folder / "documents")


def rows(folder: DocumentFolder) -> list[dict[str, Any]]:
    """All documents, with prompt and answer apart."""
    found = []
    for number in range(folder.num_shards):
        shard = folder.shard(number)
        for d in range(len(shard)):
            span = slice(shard.offsets[d], shard.offsets[d + 1])
            ids, mask = shard.ids_N[span].tolist(), shard.mask_N[span].tolist()
            assert mask == sorted(mask)
            prompt = mask.index(1)
            row = {"environment": shard.environments[d], "effort": shard.efforts[d], "correct": shard.correct[d]}
            found.append({"prompt": ids[:prompt], "answer": ids[prompt:], **row})
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "documents").iterdir())}


def test_greedy_answers_are_the_parents(parent, tmp_path):
    results, folder = run(tmp_path / "a", parent, temperature=0.0, efforts={"low": 1.0, "high": 2.0})
    pairs = draw([Chains(), Counting()], {"low": 1.0, "high": 2.0}, 20, 0, held_out=False)
    tokenizer, model = build_tokenizer(), GptOssForCausalLM.from_pretrained(parent, dtype="float32").eval()
    found, finished, tokens = rows(folder), Counter[str](), Counter[str]()
    assert len(found) == len(pairs) == 20 and folder.num_shards == 3
    for row, (problem, effort) in zip(found, pairs, strict=True):
        assert not is_held_out(problem)
        prompt = tokenizer(render_prompt(tokenizer, problem, effort), add_special_tokens=False)["input_ids"]
        (answer, ended), *_ = generate_greedily(model, tokenizer, [prompt], 12)
        assert (row["prompt"], row["answer"]) == (prompt, answer)
        assert (row["environment"], row["effort"], row["correct"]) == (problem.environment, effort, 0.0)
        finished[effort] += ended
        tokens[effort] += len(answer)
    count = Counter(effort for _, effort in pairs)
    for effort in ("low", "high"):
        assert results[f"prompts/{effort}"] == results[f"kept/{effort}"] == count[effort]
        assert results[f"finished/{effort}"] == finished[effort] / count[effort]
        assert results[f"tokens/{effort}"] == tokens[effort] / count[effort]
        assert results[f"accuracy/{effort}"] == 0.0
    assert 0 < sum(finished.values()) < 20
    assert results["documents"] == 20 and results["targets"] == sum(tokens.values())


def test_a_shard_depends_on_seed_and_number_alone(parent, tmp_path):
    state = torch.get_rng_state()
    run(tmp_path / "a", parent, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    run(tmp_path / "b", parent, seed=3, num_prompts=16)  # the same two shards, and then an end
    run(tmp_path / "c", parent, seed=4)
    a, b, c = (files(tmp_path / name) for name in "abc")
    shards = [f"shard-0000{n}.parquet" for n in range(3)]
    assert [a[name] == b[name] for name in shards[:2]] == [True, True] and set(a) - set(b) == {shards[2]}
    assert not any(a[name] == c[name] for name in shards)
    assert len({shard_seed(seed, number) for seed in range(50) for number in range(50)}) == 2500


def test_top_p_draws_from_the_most_likely_tokens(parent):
    """With a tiny top_p sampling is greedy, whatever the temperature; with all of them it is not."""
    tokenizer, model = build_tokenizer(), GptOssForCausalLM.from_pretrained(parent, dtype="float32").eval()
    prompts = [[9, 10, 11], [12], [13, 14]]
    greedy = [generate_greedily(model, tokenizer, [prompt], 40)[0] for prompt in prompts]
    drawn = [sample_in_batches(model, tokenizer, prompts, Sampling(40, 1.0, top_p), 2, seed=1) for top_p in (1e-6, 1.0)]
    assert drawn[0] == greedy != drawn[1]
    assert drawn[1] != sample_in_batches(model, tokenizer, prompts, Sampling(40), 2, seed=2)
    assert sample_in_batches(model, tokenizer, prompts, Sampling(40, 0.0), 2, seed=1) == greedy


def test_sampled_tokens_have_the_parents_probabilities(parent):
    """2,000 first tokens against the softmax at temperature 0.7; chi-square, 127 degrees of freedom at most."""
    tokenizer, model = build_tokenizer(), GptOssForCausalLM.from_pretrained(parent, dtype="float32").eval()
    with torch.no_grad():
        expected = (model(torch.tensor([[9, 10, 11]])).logits[0, -1] / 0.7).softmax(-1).double() * 2000
    drawn = sample_in_batches(model, tokenizer, [[9, 10, 11]] * 2000, Sampling(1, 0.7), 500, seed=0)
    counts = torch.zeros(128, dtype=torch.float64)
    for (token,), _ in drawn:
        counts[token] += 1
    often = expected > 5
    deviation = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert often.sum() > 5 and deviation < 2 * often.sum()


class Lucky(Chains):
    """Calls an answer right when its length is even."""

    def verify(self, completion: str, problem_answer: str) -> float:
        return float(len(build_tokenizer()(completion, add_special_tokens=False)["input_ids"]) % 2 == 0)


def test_only_right_answers_are_kept(parent, tmp_path):
    everything, all_documents = run(tmp_path / "a", parent, environments=[Lucky()])
    results, folder = run(tmp_path / "b", parent, environments=[Lucky()], keep="correct")
    right = [row for row in rows(all_documents) if row["correct"] == 1.0]
    assert rows(folder) == right and 0 < len(right) < 20
    for effort in ("low", "medium", "high"):
        assert results[f"accuracy/{effort}"] == everything[f"accuracy/{effort}"]
        assert results[f"kept/{effort}"] == sum(row["effort"] == effort for row in right)
    with pytest.raises(ValueError, match="keep: correct left none of 20 answers"):
        run(tmp_path / "c", parent, keep="correct", temperature=0.0)


def write_prompts(folder: Path, count: int = 40) -> list[dict[str, Any]]:
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
        results, folder = run(tmp_path / f"run {name}", parent, prompts=tmp_path / name, num_prompts=None)
        documents = rows(folder)
        assert {row["environment"] for row in documents} == {name.partition(".")[0]}
        assert {row["correct"] for row in documents} == {None} and "accuracy/low" not in results
        seen.append([(row["prompt"], row["answer"]) for row in documents])
    assert seen[0] == seen[1] == seen[2]
    texts = [build_tokenizer().decode(prompt) for prompt, _ in seen[0]]
    for row, out in zip(made, held_out, strict=True):
        assert sum(row[0]["content"] in text for text in texts) == (not out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": []}', r"prompts\.jsonl:1: messages must be objects"),
        ('{"prompt": "a", "messages": []}', "is not of the form"),
        ('{"text": "a"}', "is not of the form"),
        ('{"prompt": "a"', "not JSON"),
        ('{"messages": [{"role": "user", "content": 1}]}', "two texts"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the assistant's"),
        ("", "holds 0 prompts"),
    ],
)
def test_bad_prompts_are_refused(line, message, parent, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", parent, prompts=tmp_path / "prompts.jsonl", num_prompts=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environments": None}, "either prompts"),
        ({"num_prompts": None}, "give num_prompts"),
        ({"prompts": Path("x.jsonl"), "keep": "correct"}, "needs environments"),
        ({"prompts": Path("missing.jsonl")}, r"prompts 'missing\.jsonl' does not exist"),
        ({"max_new_tokens": 250}, r"context - max_new_tokens leaves 6"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"top_p": 0.0}, r"top_p 0\.0"),
        ({"shard_size": 0}, "shard_size 0"),
        ({"efforts": {"hihg": 1.0}}, "hihg"),
        ({"engine": "vllm"}, "needs vLLM"),
        ({"parent": Path("nowhere")}, "nowhere' does not exist"),
    ],
)
def test_bad_arguments_are_refused_before_the_parent_is_loaded(settings, message, parent, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_puzzle.generation.engines.load_policy", lambda *_: pytest.fail("the parent was loaded"))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", settings.pop("parent", parent), **settings)
    assert not any((tmp_path / "run").iterdir())


def test_prompts_that_are_too_few(parent, tmp_path):
    write_prompts(tmp_path)
    with pytest.raises(ValueError, match="40 were asked for"):
        run(tmp_path / "run", parent, prompts=tmp_path / "prompts.jsonl", num_prompts=40)
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"holds the splits \['train'\]: name one, .*splits/train"):
        run(tmp_path / "run", parent, prompts=tmp_path / "splits")


@pytest.mark.parametrize("prompts", [64, 256])
def test_disk_is_as_the_formula_says(prompts, parent, tmp_path):
    results, _ = run(tmp_path / "run", parent, num_prompts=prompts, shard_size=64, batch_size=64, max_new_tokens=8)
    size = sum(len(content) for name, content in files(tmp_path / "run").items() if name.endswith(".parquet"))
    assert size < 5 * results["tokens"] + 2**16 * results["shards"]
