"""Calibration data: what the parent is given and generates, what a file may hold, and how batches reach processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.by_generate import by_generate
from lightning import LightningModule, Trainer
from torch import Tensor
from transformers import GptOssForCausalLM

from lit_puzzle.data.calibration import CalibrationData, RankBatches, pad_right
from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.environments.environment import draw, is_held_out
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.importance.importance import ExpertImportance
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains, Sorting

SOURCE = PromptSource([Chains()], num_prompts=6)


@pytest.fixture(scope="module")
def parent(tiny_config, tmp_path_factory) -> Path:
    """A random model with the tiny world's tokenizer."""
    folder = tmp_path_factory.mktemp("parent")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = GptOssForCausalLM(tiny_config(vocab_size=128, max_position_embeddings=256, **special))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_trainer(folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


class Collect(LightningModule):
    """Keeps the batches it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Tensor]] = []

    def validation_step(self, batch, batch_idx):
        self.batches.append(batch)


def rows_seen(folder: Path, data: CalibrationData) -> list[list[int]]:
    """The sequences that arrive at a module, sorted, padding removed."""
    module = Collect()
    make_trainer(folder).validate(module, data, verbose=False)
    pairs = [pair for batch in module.batches for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return sorted(ids[mask.bool()].tolist() for ids, mask in pairs)


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "calibration.jsonl").read_text().splitlines()]


def test_the_parent_completes_training_problems_and_the_file_can_be_read_again(parent, tmp_path):
    source = PromptSource([Chains(), Sorting()], efforts={"low": 1, "high": 2}, num_prompts=9)
    data = CalibrationData(parent, source, sampling=Sampling(5, 0.0), batch_size=4)
    seen = rows_seen(tmp_path / "a", data)
    lines = written(tmp_path / "a")
    assert sorted(line["input_ids"] for line in lines) == seen
    assert {line["environment"] for line in lines} == {"chains", "sorting"}
    tokenizer = build_tokenizer()
    pairs = draw([Chains(), Sorting()], {"low": 1, "high": 2}, 9, 0, held_out=False)
    assert not any(is_held_out(problem) for problem, _ in pairs)
    model = GptOssForCausalLM.from_pretrained(parent, dtype="float32").eval()
    for line, (problem, effort) in zip(lines, pairs, strict=True):
        prompt = line["input_ids"][: line["prompt_tokens"]]
        text = tokenizer.decode(prompt)
        assert problem.messages[-1]["content"] in text and f"Reasoning: {effort}" in text
        assert line["input_ids"][len(prompt) :] == by_generate(model, [prompt], 5)[0].token_ids
    again = CalibrationData(parent, sequences=tmp_path / "a" / "calibration.jsonl", batch_size=2)
    assert rows_seen(tmp_path / "b", again) == seen


def test_sampling_follows_its_seed_and_leaves_the_random_state_alone(parent, tmp_path):
    def sample(name: str, seed: int, batch_size: int = 96) -> list[dict[str, Any]]:
        state = torch.get_rng_state()
        engine = EngineSettings("transformers", batch_size=batch_size)
        data = CalibrationData(parent, SOURCE, sampling=Sampling(8, seed=seed), engine=engine)
        data.trainer = make_trainer(tmp_path / name)
        data.prepare_data()
        assert torch.equal(torch.get_rng_state(), state)
        return written(tmp_path / name)

    assert sample("a", 1) == sample("b", 1, batch_size=3) != sample("c", 2)


def test_importance_of_generated_sequences_end_to_end(parent, tmp_path):
    data = CalibrationData(parent, SOURCE, sampling=Sampling(4, 0.0))
    make_trainer(tmp_path / "run").validate(ExpertImportance(parent), data, verbose=False)
    importance = Importance.load(tmp_path / "run")
    assert importance.tokens == sum(len(line["input_ids"]) for line in written(tmp_path / "run"))


def test_texts_are_tokenized_as_they_stand(parent, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": " q=5 q:?"}\n\n{"input_ids": [3, 4]}\n')
    vocabulary = build_tokenizer().get_vocab()
    expected = [vocabulary[word] for word in (" q=", "5", " q:", "?")]
    data = CalibrationData(parent, sequences=tmp_path / "texts.jsonl")
    assert rows_seen(tmp_path / "a", data) == sorted([[3, 4], expected])


def test_every_rank_gets_as_many_batches_and_every_token_counts_once():
    batches = [[[7] * 5, [7] * 3], [[7] * 2], [[7]]]
    for world_size in (1, 2, 3, 4, 5):
        ranks = [list(RankBatches(batches, rank, world_size)) for rank in range(world_size)]
        assert len({len(mine) for mine in ranks}) == 1
        assert sum(int(batch["scored_mask"].sum()) for mine in ranks for batch in mine) == 11
        assert all(batch["attention_mask"].any(dim=1).all() for mine in ranks for batch in mine)


def test_padding_is_on_the_right():
    batch = pad_right([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == batch["scored_mask"].long().tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no sequence"),
        ('{"input_ids": []}', "non-empty list"),
        ('{"input_ids": [1, "2"]}', "whole numbers"),
        ('{"input_ids": [1, true]}', "whole numbers"),
        ('{"input_ids": [1, 128]}', r"sequence 1 has token ids 1\.\.128; the parent knows 0\.\.127"),
        ('{"input_ids": [1, -1]}', r"token ids -1\.\.1"),
        ('{"ids": [1]}', "not of the form"),
        (
            '{"input_ids": [1, 2]}\n{"input_ids": [1, 2], "prompt_tokens": 2}',
            r"bad\.jsonl:2: .* 2 tokens, prompt_tokens",
        ),
        ('{"input_ids": [1, 2], "prompt_tokens": -1}', r"bad\.jsonl:1: .*prompt_tokens is -1"),
        ('{"text": "a", "prompt_tokens": 9}', r"bad\.jsonl:1: .*prompt_tokens is 9"),
        ('{"input_ids": [1, 2], "prompt_tokens": "1"}', "must be a whole number"),
        ('{"input_ids": [1], "text": "a"}', "not of the form"),
        ('{"text": ""}', "non-empty text"),
        ('{"input_ids": [1]}\n[1, 2', r"bad\.jsonl:2 is not JSON"),
        (json.dumps({"input_ids": [1] * 257}), "sequence 1 has 257 tokens; the parent's context holds 256"),
    ],
)
def test_bad_sequences_are_refused_before_the_parent_is_loaded(text, message, parent, tmp_path, monkeypatch):
    monkeypatch.setattr(ExpertImportance, "configure_model", lambda self: pytest.fail("the parent was loaded"))
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run").validate(
            ExpertImportance(parent), CalibrationData(parent, sequences=tmp_path / "bad.jsonl"), verbose=False
        )


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Give CalibrationData documents"):
        CalibrationData(tmp_path)
    with pytest.raises(ValueError, match="batch_size 0"):
        CalibrationData(tmp_path, SOURCE, batch_size=0)
    with pytest.raises(ValueError, match="num_prompts 0"):
        PromptSource([Chains()], num_prompts=0)
    with pytest.raises(ValueError, match="hihg"):
        PromptSource([Chains()], efforts={"hihg": 1.0})


def test_a_given_file_is_read_and_nothing_is_generated(parent, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [3, 4]}\n')
    data = CalibrationData(parent, SOURCE, tmp_path / "rows.jsonl")
    assert rows_seen(tmp_path / "a", data) == [[3, 4]]
    assert not (tmp_path / "a" / "calibration.jsonl").exists()


def test_missing_inputs_are_named(parent, tmp_path):
    file = CalibrationData(parent, sequences=tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"calibration data .*missing\.jsonl' does not exist"):
        make_trainer(tmp_path / "run").validate(Collect(), file, verbose=False)
    with pytest.raises(ValueError, match=r"parent checkpoint .*nowhere' does not exist"):
        CalibrationData(tmp_path / "nowhere", SOURCE)
