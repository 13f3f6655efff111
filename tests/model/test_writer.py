"""Writing: what the safetensors library and transformers read back, shards, refusals, and a kill in the middle."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.released_twin import TWIN_CONFIG, twin_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.safetensors_file import DTYPE_CODES, read_header
from lit_puzzle.model.writer import Layout, StoredRows, atomic_folder, write_checkpoint

MIXED = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "scalar": torch.tensor(0.25),
    "wide": torch.randn(5, generator=torch.Generator().manual_seed(1)),
}


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    return {name: (DTYPE_CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_the_library_reads_what_we_wrote_in_any_order(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layout_of(MIXED), reversed(MIXED.items()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == MIXED.keys()
    assert all(torch.equal(read[name], MIXED[name]) and read[name].dtype == MIXED[name].dtype for name in MIXED)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_written(tmp_path: Path, value: float) -> None:
    spoiled = MIXED | {"wide": torch.tensor([1.0, value, 1.0, 1.0, 1.0])}
    with pytest.raises(ValueError, match="wide would be written with values that are NaN or infinite"):
        write_checkpoint(tmp_path, layout_of(spoiled), spoiled.items())


def test_stored_rows_are_checked_before_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows that are kept count; a buffer of any size finds the value."""
    values = torch.ones(4, 3, 5, dtype=torch.bfloat16)
    values[2, 1, 4] = float("nan")
    scales = torch.tensor([[7, 9], [255, 7]], dtype=torch.uint8)
    save_file({"experts": values, "a_scales": scales}, tmp_path / "source.safetensors")
    source = read_header(tmp_path / "source.safetensors")
    refusals = {
        "experts": ((0, 2), "experts has 1 of .* not finite"),
        "a_scales": ((1,), "a_scales has a scale byte of 255"),
    }
    for size in (1 << 24, 16, 6):
        monkeypatch.setattr("lit_puzzle.model.writer.BUFFER_BYTES", size)
        for name, (rows, message) in refusals.items():
            stored = StoredRows(source[name], rows)
            folder = tmp_path / f"{name}{size}"
            folder.mkdir()
            with pytest.raises(ValueError, match=rf"source\.safetensors: {message}"):
                write_checkpoint(folder, {name: (stored.info.dtype, stored.shape)}, [(name, stored)])
    kept = {"experts": StoredRows(source["experts"], (3, 0, 1)), "a_scales": StoredRows(source["a_scales"], (0,))}
    (tmp_path / "child").mkdir()
    write_checkpoint(
        tmp_path / "child", {name: (rows.info.dtype, rows.shape) for name, rows in kept.items()}, kept.items()
    )
    assert torch.equal(load_file(tmp_path / "child" / "model.safetensors")["experts"], values[[3, 0, 1]])


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = twin_tensors()
    write_checkpoint(tmp_path, layout_of(tensors), tensors.items(), max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name in files:
        held = load_file(tmp_path / name)
        assert sorted(held) == sorted(key for key, file in index["weight_map"].items() if file == name)
        assert sum(tensor.nbytes for tensor in held.values()) <= 30_000
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in held.items())
    (tmp_path / "config.json").write_text(json.dumps(TWIN_CONFIG))
    Checkpoint(tmp_path)


@pytest.mark.parametrize("order", [list, reversed], ids=["forwards", "backwards"])
def test_a_shard_is_reported_when_its_last_byte_is_written(tmp_path: Path, order: Callable[..., Iterable[str]]) -> None:
    tensors, seen = twin_tensors(), dict[str, bytes]()
    written = [(name, tensors[name]) for name in order(list(tensors))]

    def note(path: Path) -> None:
        seen[path.name] = path.read_bytes()

    write_checkpoint(tmp_path, layout_of(tensors), written, 30_000, shard_done=note)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert list(seen) == list(order(files)) and len(files) > 3
    assert all(seen[name] == (tmp_path / name).read_bytes() for name in files)


def test_one_tensor_larger_than_a_shard_is_not_split(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "b": torch.ones(1000), "c": torch.ones(10)}
    write_checkpoint(tmp_path, layout_of(tensors), tensors.items(), max_shard_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert torch.equal(load_file(tmp_path / "model-00002-of-00003.safetensors")["b"], tensors["b"])


def test_views_and_transposes_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"rows": base[1:], "turned": base.T}
    write_checkpoint(tmp_path, layout_of(tensors), tensors.items())
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["rows"], base[1:]) and torch.equal(read["turned"], base.T)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", torch.zeros(2)), ("c", torch.zeros(1))], "tensor c was not expected"),
        ([("a", torch.zeros(2)), ("a", torch.zeros(2))], "tensor a was already written"),
        ([("a", torch.zeros(3))], r"tensor a is F32 \(3,\), expected F32 \(2,\)"),
        ([("a", torch.zeros(2).half())], r"tensor a is F16 \(2,\), expected F32"),
        ([("a", torch.zeros(2, dtype=torch.int64))], r"tensor a is None \(2,\), expected F32"),
        ([("a", torch.zeros(2))], r"missing tensor\(s\): \['b'\]"),
    ],
)
def test_tensors_unlike_the_layout_are_refused(
    tmp_path: Path, tensors: Iterable[tuple[str, Tensor]], message: str
) -> None:
    layout: Layout = {"a": ("F32", (2,)), "b": ("F32", (1,))}
    with pytest.raises(ValueError, match=message), atomic_folder(tmp_path / "child") as scratch:
        write_checkpoint(scratch, layout, tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"need 4194304\.00 GiB, the disk has"):
        write_checkpoint(tmp_path, {"a": ("F32", (1 << 30, 1 << 20))}, [])
    assert list(tmp_path.iterdir()) == []


def test_folder_appears_whole_and_replaces_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "child"
    with atomic_folder(target) as scratch:
        (scratch / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(ValueError, match="already exists"), atomic_folder(target):
        pass
    with pytest.raises(FileNotFoundError), atomic_folder(target, replace=True) as scratch:
        (scratch / "missing" / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    target.rename(target.with_name(".child.old"))  # as if killed between the two renames of a replacement
    with pytest.raises(ValueError, match="already exists"), atomic_folder(target):
        pass
    assert (target / "a").read_text() == "1"
    with atomic_folder(target, replace=True) as scratch:
        (scratch / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["child"]


def write_and_be_killed(target: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "bytes", MIXED["bytes"]
        os.kill(os.getpid(), signal.SIGKILL)

    with atomic_folder(target, replace=True) as scratch:
        write_checkpoint(scratch, layout_of(MIXED), tensors())


def test_kill_in_the_middle_leaves_the_old_folder_and_a_later_write_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "child"
    with atomic_folder(target) as scratch:
        write_checkpoint(scratch, layout_of(MIXED), MIXED.items())
    process = multiprocessing.get_context("fork").Process(target=write_and_be_killed, args=(target,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / ".child.partial" / "model.safetensors").exists()
    assert torch.equal(load_file(target / "model.safetensors")["wide"], MIXED["wide"])
    with atomic_folder(target, replace=True) as scratch:
        write_checkpoint(scratch, layout_of(MIXED), MIXED.items())
    assert [path.name for path in tmp_path.iterdir()] == ["child"]


def kernel_that_stops(after: int) -> Callable[..., int]:
    """Copies some bytes, then says that it cannot: the rest must follow where it stopped."""
    calls = iter(range(after))
    real = os.copy_file_range

    def copy(source: int, target: int, count: int, *offsets: int) -> int:
        if next(calls, None) is None:
            raise OSError(errno.EXDEV, "another file system")
        return real(source, target, min(count, 5), *offsets)

    return copy


@pytest.mark.parametrize("kernel_calls", [None, 0, 3])
def test_stored_rows_are_copied_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_calls: int | None
) -> None:
    stored = {"experts": torch.randn(8, 3, 5).bfloat16(), "blocks": torch.randint(0, 255, (8, 33), dtype=torch.uint8)}
    (tmp_path / "parent").mkdir()
    write_checkpoint(tmp_path / "parent", layout_of(stored), stored.items())
    source = read_header(tmp_path / "parent" / "model.safetensors")
    if kernel_calls is not None:
        monkeypatch.setattr(os, "copy_file_range", kernel_that_stops(kernel_calls))
    kept = (1, 2, 3, 6, 5)
    expected = {"experts": stored["experts"][list(kept)], "blocks": stored["blocks"]}
    parts = {"experts": StoredRows(source["experts"], kept), "blocks": StoredRows(source["blocks"])}
    (tmp_path / "child").mkdir()
    write_checkpoint(tmp_path / "child", layout_of(expected), parts.items())
    written = load_file(tmp_path / "child" / "model.safetensors")
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert len(list(parts["experts"].runs())) == 3


def test_a_stored_tensor_of_another_shape_or_cut_short_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layout_of(MIXED), MIXED.items())
    file = tmp_path / "model.safetensors"
    stored = StoredRows(read_header(file)["wide"], (0, 1))
    (tmp_path / "child").mkdir()
    with pytest.raises(ValueError, match=r"wide is F32 \(2,\), expected F32 \(5,\)"):
        write_checkpoint(tmp_path / "child", {"wide": ("F32", (5,))}, [("wide", stored)])
    os.truncate(file, stored.info.begin + 4)
    shutil.rmtree(tmp_path / "child")
    (tmp_path / "child").mkdir()
    with pytest.raises(ValueError, match="became shorter while it was copied"):
        write_checkpoint(tmp_path / "child", {"wide": ("F32", (2,))}, [("wide", stored)])
