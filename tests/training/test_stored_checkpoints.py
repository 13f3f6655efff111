"""Training checkpoints run no code when they are read, and damage is found before a run resumes from them."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from lit_puzzle.training.stored_checkpoints import (
    CheckpointReader,
    check_checkpoint,
    load_plain,
    load_sharded,
)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "state_dict": {"weight": torch.rand(40, 30, generator=generator), "bias": torch.rand(7, generator=generator)},
        "optimizer_0": {"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False, "name": None},
    }


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "step=3.ckpt"
    dcp.save(state(), checkpoint_id=folder)
    torch.save({"epoch": 1, "random": [torch.get_rng_state(), [1, 2.5, "x", None]]}, folder / "meta.pt")
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    torch.save(state(), tmp_path / "step=3.file.ckpt")
    return tmp_path / "step=3.file.ckpt"


def empty() -> dict[str, Any]:
    loaded = state()
    for name in ("weight", "bias"):
        loaded["state_dict"][name].zero_()
    loaded["optimizer_0"] |= {"lr": 0.0, "betas": (0.0, 0.0)}
    return loaded


def test_what_was_saved_is_loaded(sharded: Path, single: Path) -> None:
    check_checkpoint(sharded)
    check_checkpoint(single)
    found = empty()
    load_sharded(found, sharded)
    for name, tensor in state()["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor)
        assert torch.equal(load_plain(single)["state_dict"][name], tensor)
    assert found["optimizer_0"] == state()["optimizer_0"]
    ours, theirs = CheckpointReader(sharded).read_metadata(), FileSystemReader(sharded).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data


def test_metadata_runs_no_code(sharded: Path, tmp_path: Path) -> None:
    (sharded / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"\.metadata cannot be loaded .*: it names posix\.mkdir, which no checkpoint"):
        check_checkpoint(sharded)
    with pytest.raises(ValueError, match=r"it names posix\.mkdir"):
        load_sharded(empty(), sharded)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(AttributeError):  # what PyTorch's own reader does with it, after running it
        FileSystemReader(sharded).read_metadata()
    assert (tmp_path / "executed").is_dir()


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 pickle members of an enumeration."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[type, str]]:
        return getattr, (self.kind, self.name)


def test_members_of_the_memory_formats_may_be_named(sharded: Path) -> None:
    """Not so anything else that `getattr` could reach."""
    member: Any = ByName(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    (sharded / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": member})))
    found: Any = CheckpointReader(sharded).read_metadata().state_dict_metadata["weight"]
    assert found is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    (sharded / ".metadata").write_bytes(pickle.dumps(ByName(Metadata, "__init__")))
    with pytest.raises(ValueError, match=r"it takes __init__ from .*Metadata.*, which no checkpoint needs"):
        CheckpointReader(sharded).read_metadata()


def test_settings_of_the_optimizer_run_no_code(sharded: Path, tmp_path: Path) -> None:
    shutil.rmtree(sharded)
    evil = state()
    evil["optimizer_0"]["lr"] = Payload(tmp_path / "executed")
    dcp.save(evil, checkpoint_id=sharded)
    with pytest.raises(ValueError, match=r"step=3\.ckpt cannot be loaded .*"):
        load_sharded(empty(), sharded)
    assert not (tmp_path / "executed").exists()
    dcp.load(empty(), checkpoint_id=sharded)
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("name", ["meta.pt", "single"])
def test_files_of_torch_run_no_code(sharded: Path, single: Path, tmp_path: Path, name: str) -> None:
    file = single if name == "single" else sharded / name
    torch.save({"random": Payload(tmp_path / "executed")}, file)
    with pytest.raises(ValueError, match=f"{file.name} cannot be loaded"):
        check_checkpoint(single if name == "single" else sharded)
    file.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(ValueError, match=f"{file.name} cannot be loaded"):
        load_plain(file)
    assert not (tmp_path / "executed").exists()


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


def inside_tensor(folder: Path) -> int:
    """A byte of the values of `weight`."""
    infos = CheckpointReader(folder).read_metadata().storage_data
    info = next(info for index, info in infos.items() if index.fqn == "state_dict.weight")
    return info.offset + info.length // 2


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no meta.pt": (lambda folder: (folder / "meta.pt").unlink(), "meta.pt, which is written last, is missing"),
    "cut meta.pt": (lambda folder: cut(folder / "meta.pt"), r"meta\.pt cannot be loaded"),
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), r"\.metadata cannot be loaded .*No such file"),
    "cut metadata": (lambda folder: cut(folder / ".metadata"), r"\.metadata cannot be loaded"),
    "empty metadata": (lambda folder: (folder / ".metadata").write_bytes(b""), r"\.metadata cannot be loaded"),
    "no shard": (lambda folder: (folder / "__0_0.distcp").unlink(), r"__0_0\.distcp cannot be loaded"),
    "cut shard": (lambda folder: cut(folder / "__0_0.distcp"), r"__0_0\.distcp cannot be loaded .*it ends at byte"),
    "flipped bit": (lambda folder: flip(folder / "__0_0.distcp", inside_tensor(folder)), "checksum|CRC"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(sharded: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(sharded)
    with pytest.raises(ValueError, match=message) as raised:
        check_checkpoint(sharded)
    assert "\n" not in str(raised.value)


def test_damage_of_a_single_file_is_found(single: Path) -> None:
    whole = single.read_bytes()
    single.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"file\.ckpt cannot be loaded"):
        check_checkpoint(single)
    single.write_bytes(whole)
    with zipfile.ZipFile(single) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    flip(single, entry.header_offset + 200 + entry.file_size // 2)
    with pytest.raises(ValueError, match="checksum"):
        check_checkpoint(single)


def test_files_outside_of_the_folder_are_refused(sharded: Path) -> None:
    metadata = FileSystemReader(sharded).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../other"
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names the file '\.\./other', outside of its folder"):
        check_checkpoint(sharded)
