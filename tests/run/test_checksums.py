import hashlib
from pathlib import Path

import pytest

from lit_puzzle.run.checksums import CHECKSUMS, check_files, read_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "README.md").write_text("text")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(tmp_path.iterdir())]
    (tmp_path / CHECKSUMS).write_text("".join(lines))
    return tmp_path


def test_only_files_that_stages_read_are_compared(folder: Path) -> None:
    (folder / "README.md").unlink()
    sums = read_checksums(folder)
    assert list(sums) == ["a.json"]
    check_files(folder, sums, ["a.json", "not listed"])


def test_folder_without_checksums_has_none(tmp_path: Path) -> None:
    assert read_checksums(tmp_path) == {}


def test_changed_file_is_named_even_after_it_was_found_intact(folder: Path) -> None:
    sums = read_checksums(folder)
    check_files(folder, sums, sums)
    (folder / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json is not the file of .*SHA256SUMS.*remove SHA256SUMS if you changed"):
        check_files(folder, sums, sums)


def test_intact_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = read_checksums(folder)
    check_files(folder, sums, sums)
    monkeypatch.setattr("lit_puzzle.run.checksums.hashlib.file_digest", None)
    check_files(folder, sums, sums)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("abc  a.json", "line 1: expected a checksum and a name"),
        (f"{'0' * 64}  ../a.json", "line 1: expected a checksum and a name"),
        (f"{'0' * 64}  /etc/passwd", "line 1: expected a checksum and a name"),
        (f"{'0' * 64}  b.json", r"b\.json is missing, but .*SHA256SUMS lists it"),
        (f"{'0' * 64}  a.json\n{'1' * 64}  a.json", "line 2: expected a checksum and a name"),
    ],
)
def test_damaged_list_is_refused(folder: Path, line: str, message: str) -> None:
    (folder / CHECKSUMS).write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_checksums(folder)


def test_list_without_the_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"SHA256SUMS does not list model\.safetensors: it was cut"):
        read_checksums(folder)
