"""Identity of files and folders: names and contents, of large files pages from the first to the last."""

import os
import shutil
from pathlib import Path

import pytest

from lit_puzzle.run import identity
from lit_puzzle.run.identity import files_hash


def test_a_folder_is_the_names_and_contents_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "a").write_text("a")
    (folder / "b").write_text("b")
    whole = files_hash(folder)
    for name in ("run.json", "config.yaml", "inputs.json", ".hidden"):
        (folder / name).write_text("bookkeeping")
    assert files_hash(folder) == whole
    shutil.copytree(folder, tmp_path / "copy")
    assert files_hash(tmp_path / "copy") == whole
    assert files_hash(folder, ["b"]) != whole
    (folder / "b").rename(folder / "c")
    assert files_hash(folder) != whole
    with pytest.raises(ValueError, match="no_such cannot be read"):
        files_hash(tmp_path / "no_such")


def test_large_files_are_sampled_from_the_first_page_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 10)
    file, pages = tmp_path / "large", identity.PAGES * 4
    file.write_bytes(os.urandom(identity.PAGE_BYTES * pages))
    first = files_hash(file)
    for place in (0, identity.PAGE_BYTES * pages - 1):
        with file.open("r+b") as stream:
            stream.seek(place)
            old = stream.read(1)
            stream.seek(place)
            stream.write(bytes([old[0] ^ 1]))
        assert files_hash(file) != first
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(old)
    assert files_hash(file) == first
    with file.open("ab") as stream:
        stream.write(b"x")
    assert files_hash(file) != first
