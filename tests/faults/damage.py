"""Ways to damage the files of a trial: each function returns what does it to the trial's folder.

A damage takes the folder of the trial; paths are relative to it. Files are replaced, never changed in place.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]
TensorChange = Callable[[dict[str, torch.Tensor]], object]
DROP = object()  # a value of `edit` that removes the key


def all_of(*damages: Damage) -> Damage:
    """Several damages, in order."""

    def apply(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return apply


def write(path: str, content: str | bytes) -> Damage:
    """A file of this content; its folder is made."""

    def apply(folder: Path) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def lines(path: str, *rows: object, repeat: int = 1) -> Damage:
    """A JSON lines file; texts stand as they are."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows] * repeat
    return write(path, "".join(text + "\n" for text in texts))


def recipe(content: Mapping[str, Any] | str, path: str = "mine.yaml") -> Damage:
    """A recipe of the user."""
    return write(path, content if isinstance(content, str) else yaml.safe_dump(dict(content)))


def edit(path: str, changes: Mapping[str, object]) -> Damage:
    """A JSON file with other values; keys are dotted, numbers index lists, `DROP` removes."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        for dotted, value in changes.items():
            *way, last = [int(word) if word.isdigit() else word for word in dotted.split(".")]
            node = content
            for step in way:
                node = node[step]
            if value is DROP:
                del node[last]
            else:
                node[last] = value
        write(path, json.dumps(content))(folder)

    return apply


def replace(path: str, old: str, new: str) -> Damage:
    """A text file in which a text is replaced; it must occur."""

    def apply(folder: Path) -> None:
        text = (folder / path).read_text()
        assert old in text, (path, old)
        write(path, text.replace(old, new, 1))(folder)

    return apply


def table(path: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    """A Parquet file with other rows."""

    def apply(folder: Path) -> None:
        rows = parquet.read_table(folder / path).to_pylist()
        stream = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist([change(row) for row in rows]), stream)
        write(path, stream.getvalue().to_pybytes())(folder)

    return apply


def remove(*paths: str) -> Damage:
    """Files or folders that are missing."""

    def apply(folder: Path) -> None:
        for path in paths:
            if (folder / path).is_dir():
                shutil.rmtree(folder / path)
            else:
                (folder / path).unlink()

    return apply


def cut(path: str, keep: float) -> Damage:
    """A file of which only the first share is left."""

    def apply(folder: Path) -> None:
        content = (folder / path).read_bytes()
        write(path, content[: int(len(content) * keep)])(folder)

    return apply


def flip(path: str, place: float = 0.9) -> Damage:
    """A file with one bit changed at this share of its length."""

    def apply(folder: Path) -> None:
        content = bytearray((folder / path).read_bytes())
        content[int(len(content) * place)] ^= 0x10
        write(path, bytes(content))(folder)

    return apply


def directory(path: str) -> Damage:
    """A folder in the place of a file."""

    def apply(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        (folder / path).mkdir(parents=True)

    return apply


def copy(source: str, target: str) -> Damage:
    """A copy of a file or folder."""

    def apply(folder: Path) -> None:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (folder / source).is_dir() else shutil.copy)(folder / source, folder / target)

    return apply


def link(path: str, target: str) -> Damage:
    """A symbolic link."""
    return lambda folder: (folder / path).symlink_to(target)


def fifo(path: str) -> Damage:
    """A named pipe that nobody writes to."""
    return lambda folder: os.mkfifo(folder / path)


def tensors(path: str, change: TensorChange) -> Damage:
    """A safetensors file with its tensors changed."""

    def apply(folder: Path) -> None:
        content = load_file(folder / path)
        change(content)
        (folder / path).unlink()
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / path, {"format": "pt"})

    return apply


def header(path: str, change: Callable[[str], str]) -> Damage:
    """A safetensors file with the text of its header changed, and the same data."""

    def apply(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        text = change(content[8 : 8 + size].decode()).encode()
        write(path, struct.pack("<Q", len(text)) + text + content[8 + size :])(folder)

    return apply


def shards(folder_name: str, change: Callable[[dict[str, str]], object], twice: str | None = None) -> Damage:
    """A checkpoint in two shards with an index, whose map of tensors to files is changed.

    Args:
        folder_name: the checkpoint.
        change: changes the map.
        twice: a tensor that both shards hold.
    """

    def apply(folder: Path) -> None:
        checkpoint = folder / folder_name
        content = load_file(checkpoint / "model.safetensors")
        names, files = sorted(content), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        places = {name: files[2 * number // len(names)] for number, name in enumerate(names)}
        for file in files:
            held = {name: content[name] for name in names if places[name] == file or name == twice}
            save_file(held, checkpoint / file, {"format": "pt"})
        (checkpoint / "model.safetensors").unlink()
        change(places)
        total = sum(tensor.nbytes for tensor in content.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply
