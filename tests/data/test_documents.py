"""The data module: what is in its batches, who gets which, and that a killed run resumes where it was."""

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recovery_runs import forked, kill_self
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from transformers import GptOssForCausalLM

from lit_puzzle.data.document_files import Document, write_documents
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.data.packing_settings import DocumentFilter, PackingSettings
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.training.checkpoints import UpdateCheckpoint
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.sharding import Sharded

TOKENS = 32


@pytest.fixture(scope="module")
def parent(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    GptOssForCausalLM(tiny_config(vocab_size=128, max_position_embeddings=64)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def make_documents(count: int = 60) -> list[Document]:
    rng = random.Random(0)
    documents = []
    for number in range(count):
        prompt = [3 + rng.randrange(125) for _ in range(rng.randrange(3, 9))]
        answer = [3 + rng.randrange(125) for _ in range(rng.randrange(1, 12))]
        mask = [0] * len(prompt) + [1] * len(answer)
        correct = (1.0, 0.0, None)[number % 3]
        documents.append(Document(prompt + answer, mask, "ab"[number % 2], ("low", "high")[number % 2], correct))
    return documents


@pytest.fixture(scope="module")
def folder(parent, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("data") / "documents"
    write_documents(target, make_documents(), parent, shard_documents=7)
    return target


def make_trainer(run: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    return Trainer(default_root_dir=run, **quiet, **(defaults | settings))


class Shared:
    """Stands for the trainer of one of several processes."""

    def __init__(self, run: Path, rank: int = 0, world_size: int = 1) -> None:
        self.default_root_dir, self.global_rank, self.world_size = run, rank, world_size


def make_data(folder: Path, parent: Path, run: Path, rank: int = 0, world: int = 1, **settings: Any) -> PackedDocuments:
    defaults: dict[str, Any] = {"sequence_tokens": TOKENS, "batch_size": 2, "validation_one_in": 4}
    data = PackedDocuments(folder, parent, **(defaults | settings))
    data.trainer = Shared(run, rank, world)  # type: ignore[assignment]
    data.prepare_data()
    data.setup("fit")
    return data


def documents_in(batches: Any) -> Counter[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Number, token ids and targets of every document in some batches, with the positions checked on the way."""
    found: Counter[tuple[int, tuple[int, ...], tuple[int, ...]]] = Counter()
    for batch in batches:
        assert {name: (value.shape[1], value.dtype) for name, value in batch.items()} == {
            "input_ids": (TOKENS, torch.long), "position_ids": (TOKENS, torch.long),
            "document_ids": (TOKENS, torch.long), "loss_mask": (TOKENS, torch.bool),
        }  # fmt: skip
        for row in range(len(batch["input_ids"])):
            owners = batch["document_ids"][row]
            for number in owners.unique().tolist():
                here = owners == number
                assert batch["position_ids"][row][here].tolist() == list(range(int(here.sum())))
                ids, mask = batch["input_ids"][row][here].tolist(), batch["loss_mask"][row][here].long().tolist()
                if number == -1:
                    assert not any(ids) and not any(mask) and owners[-1] == -1
                else:
                    found[number, tuple(ids), tuple(mask)] += 1
    return found


@pytest.mark.parametrize("method", ["first_fit", "sequential"])
def test_every_document_is_in_one_split_once(method, folder, parent, tmp_path):
    data = make_data(folder, parent, tmp_path, packing=PackingSettings(method), batch_size=1)
    train, validation = documents_in(data.train_dataloader()), documents_in(data.val_dataloader())
    expected = {(n, tuple(d.input_ids), tuple(d.loss_mask)): 1 for n, d in enumerate(make_documents())}
    assert train + validation == Counter(expected) and not train & validation
    assert 5 < len(validation) < 25
    statistics = data.statistics
    assert statistics["train/tokens"] == sum(len(ids) for _, ids, _ in train)
    assert statistics["validation/targets"] == sum(sum(mask) for _, _, mask in validation)
    places = statistics["train/sequences"] * TOKENS
    assert statistics["train/efficiency"] == statistics["train/tokens"] / places > 0.7


def test_answers_to_one_prompt_stay_on_one_side(parent, tmp_path):
    prompts = [[3 + n, 4, 5] for n in range(20)]
    documents = [Document([*p, answer], [0, 0, 0, 1], "a", "low") for answer in (9, 10) for p in prompts]
    write_documents(tmp_path / "d", documents, parent)
    data = make_data(tmp_path / "d", parent, tmp_path, batch_size=1)
    sides = [{ids[:3] for _, ids, _ in documents_in(data.val_dataloader())}]
    sides.append({ids[:3] for _, ids, _ in documents_in(data.train_dataloader())})
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_equal_seeds_give_equal_batches(folder, parent, tmp_path):
    def rows(run: str, seed: int) -> list[list[int]]:
        data = make_data(folder, parent, tmp_path / run, seed=seed)
        return [batch["input_ids"].flatten().tolist() for batch in data.train_dataloader()]

    assert rows("a", 1) == rows("b", 1) != rows("c", 2)
    assert rows("a", 1) == rows("b", 1)  # packed files that are there already
    assert rows("a", 2) == rows("c", 2)  # and those of other settings, replaced


def test_epochs_differ_in_order_only(folder, parent, tmp_path):
    loader = make_data(folder, parent, tmp_path, batch_size=1).train_dataloader()
    epochs = [[tuple(batch["input_ids"][0].tolist()) for batch in loader] for _ in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_steps_of_one_process(world, folder, parent, tmp_path):
    """Rank by rank side by side, the batches are those of one process with all the sequences of a step."""
    whole = make_data(folder, parent, tmp_path, batch_size=2 * world)
    parts = [make_data(folder, parent, tmp_path, rank, world) for rank in range(world)]
    for loaders in ([d.train_dataloader() for d in (whole, *parts)], [d.val_dataloader() for d in (whole, *parts)]):
        expected, *shares = ([batch["input_ids"] for batch in loader] for loader in loaders)
        assert {len(share) for share in shares} == {len(expected)} == {len(loader) for loader in loaders}
        joined = [torch.cat(rows) for rows in zip(*shares, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(expected, joined, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_target_is_validated_once(world, folder, parent, tmp_path):
    """Whatever is needed to even the ranks out holds no target and no document."""
    parts = [make_data(folder, parent, tmp_path, rank, world, batch_size=4) for rank in range(world)]
    batches = [batch for part in parts for batch in part.val_dataloader()]
    expected = documents_in(make_data(folder, parent, tmp_path, batch_size=1).val_dataloader())
    assert documents_in(batches) == expected
    rows = torch.cat([batch["document_ids"] for batch in batches])
    padding = (rows == -1).all(dim=1)
    assert 0 < int(padding.sum()) == len(rows) - parts[0].statistics["validation/sequences"]


@pytest.mark.parametrize("consumed", [0, 1, 3])
def test_a_loader_resumes_where_another_stopped(consumed, folder, parent, tmp_path):
    loader = make_data(folder, parent, tmp_path).train_dataloader()
    batches = [batch["input_ids"] for _ in range(2) for batch in loader]
    first = make_data(folder, parent, tmp_path).train_dataloader()
    for _ in first:
        pass
    for _, _ in zip(range(consumed), first, strict=False):  # left in the middle, as Lightning leaves it at max_steps
        pass
    state = first.state_dict()
    again = make_data(folder, parent, tmp_path).train_dataloader()
    again.load_state_dict(state)
    left = [batch["input_ids"] for batch in again]
    assert len(left) == len(loader) - consumed
    assert all(torch.equal(a, b) for a, b in zip(left, batches[len(loader) + consumed :], strict=True))
    assert again.state_dict() == loader.state_dict()
    other = make_data(folder, parent, tmp_path, batch_size=3).train_dataloader()
    with pytest.raises(ValueError, match=r"with 2 sequences a step .* now they are 3"):
        other.load_state_dict(state)
    spread = make_data(folder, parent, tmp_path, 1, 2, batch_size=1).train_dataloader()
    spread.load_state_dict(state)  # two processes instead of one, as many sequences a step
    assert [b["input_ids"][0].tolist() for b in spread] == [rows[1].tolist() for rows in left]


class Reader(LightningModule):
    """Trains one number on what it reads and notes every batch; kills itself after `dies_at` batches."""

    def __init__(self, file: Path, dies_at: int = -1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.file, self.dies_at = file, dies_at

    def configure_model(self) -> None:
        """`Sharded` asks for it; one number is not sharded."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        number = self.trainer.fit_loop.total_batch_idx
        if number == self.dies_at:
            kill_self()
        with self.file.open("a") as stream:
            stream.write(json.dumps([number, batch["input_ids"].tolist()]) + "\n")
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch["input_ids"].shape == (2, TOKENS)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(run: Path, rank: int, devices: int, folder: Path, parent: Path, steps: int, dies_at: int = -1) -> None:
    run.mkdir(exist_ok=True)
    data = PackedDocuments(folder, parent, TOKENS, batch_size=2, validation_one_in=4)
    callbacks: list[Callback] = [UpdateCheckpoint(every_n_updates=2)]
    trainer = make_trainer(
        run, devices=devices, strategy=Sharded(), callbacks=callbacks, enable_checkpointing=True, max_steps=steps,
        max_epochs=-1, accumulate_grad_batches=2, val_check_interval=5, check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Reader(run / f"seen{rank}.jsonl", dies_at), data, ckpt_path=sound_checkpoint(run))


def seen(run: Path, rank: int) -> dict[int, Any]:
    """Batch -> token ids, over all attempts; a batch that was run again must have been the same."""
    found: dict[int, Any] = {}
    for line in (run / f"seen{rank}.jsonl").read_text().splitlines():
        number, ids = json.loads(line)
        assert found.setdefault(number, ids) == ids, f"batch {number} was another one the second time"
    return found


@pytest.mark.parametrize(("devices", "deaths"), [(1, (5, 13)), (2, (13,))])
@pytest.mark.slow
def test_a_killed_fit_resumes_in_the_middle_of_an_epoch(devices, deaths, folder, parent, tmp_path):
    """10 updates of up to 2 batches are several epochs; killed in the first one, in a later one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = devices, folder, parent, 10
    assert forked(devices, lambda rank: fit(whole, rank, *arguments)) == [0] * devices
    for dies_at in deaths:
        assert -9 in forked(devices, lambda rank, at=dies_at: fit(killed, rank, *arguments, at))  # type: ignore[misc]
    assert forked(devices, lambda rank: fit(killed, rank, *arguments)) == [0] * devices
    for rank in range(devices):
        expected = seen(whole, rank)
        assert len(expected) > 14 and seen(killed, rank) == expected
        assert len((killed / f"seen{rank}.jsonl").read_text().splitlines()) < 20 + 2 * 4  # and not from the start


def test_memory_and_disk_are_as_the_formulas_say(parent, tmp_path):
    """Peak of what Python and numpy allocate while packing, at two sizes; and the bytes of the packed files."""
    peaks = []
    for count in (400, 1200):
        documents = [Document([5 + n % 90] * 9, [0] * 4 + [1] * 5, "a", "low") for n in range(count)]
        write_documents(tmp_path / f"d{count}", documents, parent, shard_documents=100)
        tracemalloc.start()
        data = make_data(tmp_path / f"d{count}", parent, tmp_path / f"run{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sequences = sum(data.statistics[f"{split}/sequences"] for split in ("train", "validation"))
        files = sum(path.stat().st_size for path in (tmp_path / f"run{count}").rglob("*.npy"))
        assert 0 <= files - (5 * TOKENS * sequences + 32 * count) < 6 * 256  # headers of six files
    assert 60 < (peaks[1] - peaks[0]) / 800 < 175


def test_long_documents_are_refused_or_cut(parent, tmp_path):
    long, short = (
        Document([*range(3, 53)], [0] * 10 + [1] * 40, "a", "low"),
        Document([9] * 8, [0] + [1] * 7, "a", "low"),
    )
    hopeless = Document([7] * 40, [0] * 35 + [1] * 5, "a", "low")  # no target within the sequence
    write_documents(tmp_path / "d", [short, long, hopeless], parent)
    with pytest.raises(ValueError, match=r"document 1 has 50 tokens, a sequence holds 32.*long_documents: cut"):
        make_data(tmp_path / "d", parent, tmp_path / "a", validation_one_in=0)
    assert not (tmp_path / "a").exists() or not any((tmp_path / "a").iterdir())
    cut = PackingSettings(long_documents="cut")
    data = make_data(tmp_path / "d", parent, tmp_path / "b", validation_one_in=0, packing=cut, batch_size=1)
    found = documents_in(data.train_dataloader())
    assert set(found) == {(0, (9,) * 8, (0,) + (1,) * 7), (1, tuple(range(3, 35)), (0,) * 10 + (1,) * 22)}
    assert data.statistics["cut_tokens"] == 18
    assert data.val_dataloader() == []
    make_trainer(tmp_path / "b", max_steps=1, num_sanity_val_steps=2).fit(Reader(tmp_path / "seen"), data)


def test_filters(folder, parent, tmp_path):
    documents = make_documents()

    def numbers(run: str, **settings: Any) -> set[int]:
        data = make_data(folder, parent, tmp_path / run, validation_one_in=0, batch_size=1, **settings)
        return {number for number, _, _ in documents_in(data.train_dataloader())}

    assert numbers("a", filter=DocumentFilter(efforts=["high"])) == {
        n for n, d in enumerate(documents) if d.effort == "high"
    }
    assert numbers("b", filter=DocumentFilter(environments=["a"], only_correct=True)) == {
        n for n, d in enumerate(documents) if d.environment == "a" and d.correct == 1.0
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"filter": DocumentFilter(["medium"])},
            r"No document is left for train: .* has 60, 0 of them pass .*'medium'",
        ),
        ({"validation_one_in": 100000}, "No document is left for validation"),
        ({"batch_size": 500}, "fewer than batch_size 500 x 1 processes"),
        ({"sequence_tokens": 65}, "context of .* holds 64"),
        ({"sequence_tokens": 1}, "sequence_tokens 1"),
        ({"validation_one_in": 1}, "validation_one_in 1"),
    ],
)
def test_bad_settings_are_refused(settings, message, folder, parent, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_data(folder, parent, tmp_path / "run", **settings)


def test_unknown_packings_are_refused():
    with pytest.raises(ValueError, match=r"packing.method is 'best_fit'; allowed: \['first_fit', 'sequential'\]"):
        PackingSettings("best_fit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"packing.long_documents is 'keep'; allowed: \['refuse', 'cut'\]"):
        PackingSettings(long_documents="keep")  # type: ignore[arg-type]
