"""Precomputed top-k logits: numbers of the full distribution, read for any packed batch, and exact divergences."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recovery_runs import forked, kill_self
from helpers.streamed_runs import ENOUGH_GIB, Killed, layers_run, same_files, stop_at
from safetensors.torch import load_file
from torch import Tensor
from transformers import GptOssForCausalLM

from lit_puzzle.data.document_files import Document, DocumentFolder, shard_name, write_documents
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.data.packing_settings import PackingSettings
from lit_puzzle.distill import top_logits
from lit_puzzle.distill.top_logits import precompute_logits, top_of
from lit_puzzle.distill.top_logits_files import Precision, TopLogits, disk_bytes
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.training.fabric import FabricSettings


@pytest.fixture(scope="module")
def parent(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    torch.manual_seed(0)
    GptOssForCausalLM(tiny_config(max_position_embeddings=64)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def make_documents(count: int = 25) -> list[Document]:
    """Some with several completions, one without targets, one of targets only."""
    rng = random.Random(0)
    documents = [Document([5, 6], [0, 0], "a", "low"), Document([7, 8, 9], [1, 1, 1], "a", "low")]
    for _ in range(count):
        turns = [rng.randrange(1, 7) for _ in range(4)]
        mask = [turn % 2 for turn, length in enumerate(turns) for _ in range(length)]
        documents.append(Document([3 + rng.randrange(125) for _ in mask], mask, "a", "low"))
    return documents


@pytest.fixture(scope="module")
def documents(parent, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "documents"
    write_documents(folder, make_documents(), parent, shard_documents=8)
    return folder


def run(folder: Path, parent: Path, documents: Path, **settings: Any) -> tuple[dict[str, float], TopLogits]:
    folder.mkdir(exist_ok=True)
    defaults: dict[str, Any] = {"top_k": 5, "precision": "float32", "batch_tokens": 40, "chunk_tokens": 7}
    results = precompute_logits(folder, parent, documents, **(defaults | settings))
    return results, TopLogits(folder / "top_logits", DocumentFolder(documents))


def batches(documents: Path, parent: Path, run_dir: Path, **settings: Any) -> list[Mapping[str, Tensor]]:
    data = PackedDocuments(documents, parent, **({"sequence_tokens": 48, "validation_one_in": 0} | settings))
    data.trainer = type("Shared", (), {"default_root_dir": run_dir, "global_rank": 0, "world_size": 1})()
    data.prepare_data()
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.fixture(scope="module")
def expected(parent) -> list[Tensor]:
    """For every document log p (T, V) of what follows each token, the document alone, stock model, eager, float64."""
    model = GptOssForCausalLM.from_pretrained(parent, dtype="float64", experts_implementation="eager").eval()
    with torch.no_grad():
        return [model(torch.tensor([d.input_ids])).logits[0].log_softmax(-1) for d in make_documents()]


def of_targets(expected: list[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """The full log p (N, V) of a batch's targets, in the order of the mask."""
    places = batch["loss_mask"].nonzero().tolist()
    owners, positions = batch["document_ids"], batch["position_ids"]
    return torch.stack([expected[int(owners[b, t])][int(positions[b, t]) - 1] for b, t in places])


CUT = {"sequence_tokens": 11, "packing": PackingSettings(long_documents="cut")}


@pytest.mark.parametrize("settings", [{}, CUT, {"batch_size": 3}])
def test_a_packed_batch_gets_the_parents_numbers(settings, parent, documents, expected, tmp_path):
    results, top = run(tmp_path / "top", parent, documents)
    targets, masses = 0, []
    for batch in batches(documents, parent, tmp_path, **settings):
        log_p_NV = of_targets(expected, batch)
        found = top.for_batch(batch)
        log_p_NK, ids_NK = log_p_NV.topk(5, dim=-1)
        assert torch.equal(found.ids_NK, ids_NK)
        torch.testing.assert_close(found.log_p_NK.double(), log_p_NK, atol=1e-5, rtol=1e-5)
        log_rest_N = (1 - log_p_NK.exp().sum(-1)).log()
        torch.testing.assert_close(found.log_rest_N.double(), log_rest_N, atol=1e-5, rtol=1e-5)
        targets += len(ids_NK)
        masses.append(log_p_NK.exp().sum(-1))
    assert targets > 50
    if not settings:
        assert results["targets"] == targets == sum(sum(d.loss_mask[1:]) for d in make_documents())
        assert results["kept_mass"] == pytest.approx(float(torch.cat(masses).mean()), abs=1e-6)
        assert top.record["fingerprint"] == fingerprint(parent)


def test_all_tokens_give_the_exact_divergence(parent, documents, expected, tmp_path):
    """KL(p || q) to a random q; with fewer tokens, of the outcomes (each token kept, any other one) it is less."""
    generator = torch.Generator().manual_seed(1)
    _, everything = run(tmp_path / "all", parent, documents, top_k=128)
    _, some = run(tmp_path / "some", parent, documents, top_k=9)
    for batch in batches(documents, parent, tmp_path):
        log_p_NV = of_targets(expected, batch)
        log_q_NV = torch.randn(log_p_NV.shape, generator=generator, dtype=torch.float64).log_softmax(-1)
        exact_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
        found = everything.for_batch(batch)
        kept_NK = found.log_p_NK.exp() * (found.log_p_NK - log_q_NV.gather(1, found.ids_NK))
        torch.testing.assert_close(kept_NK.sum(-1), exact_N, atol=1e-5, rtol=1e-5)
        assert bool((found.log_rest_N == float("-inf")).all())
        found = some.for_batch(batch)
        log_q_NK = log_q_NV.gather(1, found.ids_NK)
        log_q_rest_N = (1 - log_q_NK.exp().sum(-1)).log()
        coarse_N = (found.log_p_NK.exp() * (found.log_p_NK - log_q_NK)).sum(-1)
        coarse_N = coarse_N + found.log_rest_N.exp() * (found.log_rest_N - log_q_rest_N)
        assert bool((coarse_N < exact_N).all()) and bool((coarse_N > 0.05 * exact_N).all())


def test_float16_is_as_exact_as_documented(parent, documents, tmp_path):
    tops = [run(tmp_path / kind, parent, documents, precision=kind, top_k=20)[1] for kind in ("float32", "float16")]
    for batch in batches(documents, parent, tmp_path):
        exact, half = (top.for_batch(batch) for top in tops)
        assert torch.equal(exact.ids_NK, half.ids_NK)
        for one, other in ((exact.log_p_NK, half.log_p_NK), (exact.log_rest_N, half.log_rest_N)):
            assert (one - other).abs().max() > 0 and bool(((one - other).abs() <= one.abs() * 2**-11 + 1e-7).all())
            assert (one.exp() - other.exp()).abs().max() < 2e-4


def test_files_are_plain_safetensors_of_the_documented_size(parent, documents, tmp_path):
    variants: list[tuple[Precision, int]] = [("float32", 5), ("float16", 40)]
    for precision, top_k in variants:
        results, _ = run(tmp_path / precision, parent, documents, precision=precision, top_k=top_k)
        said = disk_bytes(int(results["targets"]), int(results["documents"]), 4, top_k, precision)
        assert 0 <= said - results["disk_bytes"] < 512 * 4
        tensors = load_file(tmp_path / precision / "top_logits" / "shard-00001.safetensors")
        assert tensors["token_ids"].dtype == torch.int32 and tensors["log_probs"].dtype == getattr(torch, precision)
        assert len(tensors["first"]) == 9 and tensors["first"][-1] == len(tensors["log_rest"])


@pytest.mark.parametrize("vocab_size", [20_000, 80_000])
def test_memory_of_a_chunk_follows_the_formula(vocab_size):
    from torch.profiler import ProfilerActivity, profile

    hidden_CE, head_VE = torch.randn(32, 4), torch.randn(vocab_size, 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        top_of(hidden_CE @ head_VE.T, 8)
    changes = [event["args"] for event in _memory_events(profiler)]
    peak = max(int(change["Total Allocated"]) for change in changes) - int(changes[0]["Total Allocated"])
    assert 4 * 32 * vocab_size <= peak + int(changes[0]["Bytes"]) <= 12 * 32 * vocab_size


def _memory_events(profiler: Any) -> list[dict[str, Any]]:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return [event for event in events if event.get("name") == "[memory]"]


def test_a_killed_run_resumes_with_the_missing_shard(parent, documents, tmp_path, monkeypatch):
    _, whole = run(tmp_path / "whole", parent, documents)
    fill, calls = top_logits.fill, []

    def dying(*arguments: Any) -> None:
        fill(*arguments)
        calls.append(1)
        if len(calls) == 3:
            kill_self()

    monkeypatch.setattr(top_logits, "fill", dying)
    assert forked(1, lambda rank: run(tmp_path / "killed", parent, documents) and None) == [-9]
    made = tmp_path / "killed" / "top_logits"
    assert sorted(path.name for path in made.iterdir()) == [
        ".shard-00002.safetensors.partial", "shard-00000.safetensors", "shard-00001.safetensors"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"holds no top_logits\.json"):
        TopLogits(made, DocumentFolder(documents))
    run(tmp_path / "killed", parent, documents)
    assert len(calls) == 2  # the two that were missing
    for path in (tmp_path / "whole" / "top_logits").iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes()
    assert whole.record == TopLogits(made, DocumentFolder(documents)).record


def test_damaged_documents_are_refused_before_they_are_claimed(parent, documents, tmp_path, monkeypatch):
    copy = shutil.copytree(documents, tmp_path / "documents")
    (copy / shard_name(1)).write_bytes((documents / shard_name(1)).read_bytes()[:-40])
    load = top_logits.open_parent
    monkeypatch.setattr(top_logits, "open_parent", lambda *_, **__: pytest.fail("the parent was loaded"))
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is no Parquet file"):
        run(tmp_path / "run", parent, copy)
    monkeypatch.setattr(top_logits, "open_parent", load)
    assert not any((tmp_path / "run").iterdir())
    shutil.copy(documents / shard_name(1), copy)
    assert run(tmp_path / "run", parent, copy)[0]["documents"] == len(DocumentFolder(documents))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 129}, r"top_k 129.*1\.\.128"),
        ({"top_k": 0}, "top_k 0"),
        ({"chunk_tokens": 0}, "chunk_tokens 0"),
        ({"documents": Path("nowhere")}, "'nowhere' does not exist"),
        ({"parent": Path("nowhere")}, "parent checkpoint 'nowhere' does not exist"),
    ],
)
def test_bad_arguments_are_refused_before_the_parent_is_loaded(
    settings, message, parent, documents, tmp_path, monkeypatch
):
    monkeypatch.setattr(top_logits, "open_parent", lambda *_, **__: pytest.fail("the parent was loaded"))
    given = {"parent": parent, "documents": documents} | settings
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", given.pop("parent"), given.pop("documents"), **given)
    assert not any((tmp_path / "run").iterdir())


def test_other_documents_parents_and_full_disks_are_refused(parent, documents, tiny_config, tmp_path, monkeypatch):
    run(tmp_path / "run", parent, documents)
    write_documents(tmp_path / "other", make_documents(24), parent)
    with pytest.raises(ValueError, match="for other documents than"):
        TopLogits(tmp_path / "run" / "top_logits", DocumentFolder(tmp_path / "other"))
    top = TopLogits(tmp_path / "run" / "top_logits", DocumentFolder(documents))
    top.check_parent(fingerprint(parent))
    with pytest.raises(ValueError, match=r"the child's plan\.json is of the parent xxh3"):
        top.check_parent("xxh3")
    write_documents(tmp_path / "silent", make_documents(0)[:1], parent)
    with pytest.raises(ValueError, match="contains no targets"):
        run(tmp_path / "a", parent, tmp_path / "silent")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"the disk has 0\.00 GiB left"):
        run(tmp_path / "b", parent, documents)
    GptOssForCausalLM(tiny_config(max_position_embeddings=8)).save_pretrained(tmp_path / "short")
    build_tokenizer().save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"context of .*short holds 8"):
        run(tmp_path / "c", tmp_path / "short", documents)


@pytest.mark.slow
def test_two_launched_sharded_processes_agree_with_one(parent, documents, expected, tmp_path):
    """As a user starts them; sequences of 30 tokens, so that a shard's last round has none for the second process."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"command: precompute_logits\nrun_dir: {tmp_path / 'two'}\nparent: {parent}\ndocuments: {documents}\n"
        "top_k: 5\nprecision: float32\nbatch_tokens: 30\nfabric: {accelerator: cpu, devices: 2}\n"
    )
    command = [sys.executable, "-m", "lit_puzzle", "run", str(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Starting with 2 processes" in done.stderr
    folder = DocumentFolder(documents)
    rounds = [len(list(top_logits.packed_tokens(folder.shard(n), 30))) for n in range(folder.num_shards)]
    assert any(count % 2 for count in rounds) and any(count > 1 for count in rounds)
    top = TopLogits(tmp_path / "two" / "top_logits", folder)
    for batch in batches(documents, parent, tmp_path):
        found, log_p_NV = top.for_batch(batch), of_targets(expected, batch)
        log_p_NK, ids_NK = log_p_NV.topk(5, dim=-1)
        assert torch.equal(found.ids_NK, ids_NK)
        torch.testing.assert_close(found.log_p_NK.double(), log_p_NK, atol=1e-5, rtol=1e-5)


def test_missing_and_damaged_files_are_refused_by_name(parent, documents, tmp_path):
    run(tmp_path, parent, documents)
    folder, opened = tmp_path / "top_logits", DocumentFolder(documents)
    record, shard = folder / "top_logits.json", folder / "shard-00001.safetensors"
    whole, stated = shard.read_bytes(), json.loads(record.read_text())

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as raised:
            TopLogits(folder, opened)
        assert "\n" not in str(raised.value)

    shard.write_bytes(whole[: len(whole) // 2])
    refused(r"shard-00001\.safetensors is missing or damaged")
    shard.unlink()
    refused(r"shard-00001\.safetensors is missing or damaged")
    shard.write_bytes(whole)
    record.write_text(json.dumps(stated | {"top_k": -1}))
    refused(r"says top_k -1\. Compute them again")
    record.write_text(json.dumps({key: stated[key] for key in stated if key != "top_k"}))
    refused(r"top_logits\.json has no top_k")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_parent_read_layer_by_layer_gives_the_same_files(parent, documents, tmp_path, precision):
    for name, gib in (("resident", None), ("streamed", ENOUGH_GIB)):
        run(tmp_path / name, parent, documents, fabric=FabricSettings("cpu", precision=precision, memory_gib=gib))
    files = sorted(path.relative_to(tmp_path / "resident") for path in (tmp_path / "resident").rglob("shard-*"))
    assert len(files) == 4
    assert all(same_files(tmp_path / "resident" / file, tmp_path / "streamed" / file) for file in files)
    assert not list((tmp_path / "streamed").glob("layers*"))


@pytest.mark.parametrize("layer", [0, 3])
def test_killed_inside_a_layer_it_goes_on_there(parent, documents, tmp_path, monkeypatch, layer):
    fabric = FabricSettings("cpu", memory_gib=ENOUGH_GIB)
    run(tmp_path / "whole", parent, documents, fabric=fabric)
    with monkeypatch.context() as patched:
        stop_at(patched, layer)
        with pytest.raises(Killed):
            run(tmp_path / "killed", parent, documents, fabric=fabric)
    seen = layers_run(monkeypatch)
    run(tmp_path / "killed", parent, documents, fabric=fabric)
    assert seen == [*range(layer, 4), *(list(range(4)) * 3)]  # the first shard from there, three whole ones
    for file in (tmp_path / "whole").rglob("shard-*"):
        assert same_files(file, tmp_path / "killed" / file.relative_to(tmp_path / "whole"))


def test_a_budget_below_one_layer_is_refused(parent, documents, tmp_path):
    with pytest.raises(ValueError, match=r"memory_gib=0\.01 was given; .* needs at least"):
        run(tmp_path / "run", parent, documents, fabric=FabricSettings("cpu", memory_gib=0.01))
    assert not list((tmp_path / "run").glob("top_logits*"))
