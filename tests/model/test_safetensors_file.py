"""One safetensors file: every dtype as the library wrote it, and every kind of damage named."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_puzzle.model.safetensors_file import DTYPES, SafetensorsFile, read_header


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": ["1"]},
        {"shape": [1.0]},
        {"shape": [True]},
        {"shape": [1] * 9},
        {"shape": None},
        {"data_offsets": [0, 4, 8]},
        {"data_offsets": ["a", "b"]},
        {"data_offsets": 4},
    ],
)
def test_entry_of_other_types_is_refused_by_file_and_tensor(tmp_path: Path, entry: dict[str, object]) -> None:
    header = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}
    with pytest.raises(ValueError, match=r"a\.safetensors: the safetensors header has the shape .* for w; a list"):
        read_header(write_raw(tmp_path / "a.safetensors", header, bytes(4)))


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    written = {code: torch.randint(0, 200, (3, 5), generator=generator).to(dtype) for code, dtype in DTYPES.items()} | {
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(written, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.tensors.keys() == written.keys()
    for name, tensor in written.items():
        read = file.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
        assert bytes(file.raw(name)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_unaligned_tensors_are_read_right(tmp_path: Path) -> None:
    value = torch.tensor([1.5, -2.0])
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "value": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path = write_raw(tmp_path / "a.safetensors", header, b"\x07" + value.numpy().tobytes())
    file = SafetensorsFile(path)
    assert torch.equal(file.read("value"), value) and file.read("byte").tolist() == [7]


def test_writing_to_a_view_does_not_reach_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    SafetensorsFile(tmp_path / "a.safetensors").read("a").zero_()
    assert SafetensorsFile(tmp_path / "a.safetensors").read("a").eq(1).all()


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 8, 16)}, 12, r"truncated: b ends at byte"),
        ({"a": entry([3], 0, 8)}, 8, r"a of shape \(3,\) needs 12 bytes, the header gives 8"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "b begins at byte .* gap or overlap"),
        ({"a": entry([2], 4, 12)}, 12, "a begins at byte .* gap or overlap"),
        ({"a": entry([2], 0, 8)}, 9, "not written to its end"),
        ({"a": entry([2], 0, 8, "I64")}, 8, "a has dtype I64; allowed"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "damaged.*data_offsets"),
        ([1], 0, "damaged"),
        (b"not json", 0, "the safetensors header is not JSON"),
        (b'{"a": 1, "a": 2}', 0, "the safetensors header: the key 'a' is given twice"),
    ],
)
def test_damage_is_named_with_the_file(tmp_path: Path, header: object, size: int, message: str) -> None:
    path = write_raw(tmp_path / "broken.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert "broken.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 40) + b"{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.safetensors is truncated or not a safetensors file"):
        read_header(path)
    with pytest.raises(ValueError, match="is missing"):
        read_header(tmp_path / "nothing.safetensors")
