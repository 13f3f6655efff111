"""Opens checkpoint folders, validates them strictly, reads single tensors or layers, and identifies a checkpoint.

Reads a Hugging Face folder (`config.json` with `model.safetensors`, or with shards and
`model.safetensors.index.json`) and compares it with the tensors that its configuration implies: an unknown, missing,
mis-shaped or truncated tensor is a ValueError that names it and its file. Pickles are never opened. Writing:
`lit_puzzle.model.writer`.

Opening checks `config.json` (`lit_puzzle.model.config`), headers, and small files against SHA256SUMS if there is one.
A tensor's values (`lit_puzzle.model.values`) are checked when it is first read, and checksums of the weight files
(`lit_puzzle.run.checksums`) by whoever is about to read all of them; with `--verify=full` everything is checked when
the folder is opened, once per process.

Memory: headers only; tensors are views of mapped files (`lit_puzzle.model.safetensors_file`) and use memory only when
they are copied. A rank of a sharded load slices rows of a `view` and so reads only its share of the disk.
Cost of the checks for B bytes: values B / 16 GB/s, checksums B / (1.8 GB/s x up to 4 cores), where copying B from the
page cache into memory takes B / 1.6 GB/s on one core: 65 GB take 41 s to copy, 4 s more for values, and 36 s more on
one core or 9 s on four for checksums.

Source: the released gpt-oss-puzzle-88B for the names of KV scales; names and shapes are in `lit_puzzle.model.layout`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_puzzle.model.config import essentials, read_config
from lit_puzzle.model.family import family_of
from lit_puzzle.model.layout import Shape, layer_blocks, layer_prefix, tensor_shapes, whole
from lit_puzzle.model.safetensors_file import SafetensorsFile, TensorInfo
from lit_puzzle.run.checksums import check_files, read_checksums
from lit_puzzle.run.files import read_json
from lit_puzzle.run.verify import verifies_all

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FINGERPRINT_WHOLE_BYTES = 1 << 20
FINGERPRINT_PAGE_BYTES = 4096
FINGERPRINT_PAGES = 16

_checked_files: set[tuple[Path, int, int]] = set()  # file, size, time of change


class Checkpoint:
    """A checked checkpoint folder.

    Attributes:
        folder: its path.
        config: its config.json.
        family: the family of its model.
        tensors: header entries of all tensors by full name.
        blocks: (number of experts, window) of every layer.
        mxfp4_layers: layers whose experts are stored as MXFP4.
    """

    def __init__(self, folder: Path) -> None:
        """Open and validate.

        Raises:
            ValueError: the folder's weights are not exactly the tensors that its config implies.
        """
        self.folder = folder
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; a checkpoint is a folder with config.json and *.safetensors")
        self.config = read_config(folder)
        self.family = family_of(self.config)
        self.blocks = layer_blocks(self.config)
        self._files = [SafetensorsFile(path) for path in weight_files(folder)]
        self._file_of = self._locate()
        self.tensors = {name: file.tensors[name] for name, file in self._file_of.items()}
        packed = [name for name in self.family.layer.expert_tensors if name.endswith("_blocks")]
        self.mxfp4_layers = frozenset(
            layer
            for layer in range(len(self.blocks))
            if any(layer_prefix(layer) + name in self.tensors for name in packed)
        )
        check_tensors(folder, self.config, self.tensors, self.mxfp4_layers)
        _check_quantization(folder, self.config, self.mxfp4_layers)
        self._sums = read_checksums(folder)
        check_files(folder, self._sums, self._sums.keys() - {file.path.name for file in self._files})
        if verifies_all():
            self.check_all()

    def _locate(self) -> dict[str, SafetensorsFile]:
        located: dict[str, SafetensorsFile] = {}
        for file in self._files:
            for name in file.tensors:
                if name in located:
                    raise ValueError(f"{name} is both in {located[name].path} and in {file.path}")
                located[name] = file
        index_path = self.folder / INDEX_FILE
        if index_path.is_file():
            _check_index(index_path, located)
        return located

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.blocks)

    def read(self, name: str) -> Tensor:
        """Return a tensor by its full name, as a view of the file.

        Raises:
            ValueError: a value is NaN or infinite, when it is read for the first time.
        """
        return self._file_of[name].read(name)

    def view(self, name: str) -> Tensor:
        """Return a tensor like `read`, unchecked: for callers that read a part of it and check that part."""
        return self._file_of[name].view(name)

    def read_ahead(self, name: str) -> None:
        """Let the kernel read a tensor into the page cache while something else is done."""
        self._file_of[name].read_ahead(name)

    def check_checksums(self) -> None:
        """Compare every weight file with SHA256SUMS, if the folder has one; each is read once in a process.

        Raises:
            ValueError: a file differs.
        """
        check_files(self.folder, self._sums, [file.path.name for file in self._files])

    def check_all(self) -> None:
        """Check values and checksums of all weights, unless this process has done so for these very files.

        Raises:
            ValueError: a value is NaN or infinite, or a file differs.
        """
        self.check_checksums()
        for file in self._files:
            state = file.path.stat()
            key = (file.path.resolve(), state.st_size, state.st_mtime_ns)
            if key not in _checked_files:
                for name in file.tensors:
                    file.read(name)
                _checked_files.add(key)

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Return all tensors of a layer by their name inside it (`mlp.router.weight`)."""
        prefix = layer_prefix(layer)
        return {name.removeprefix(prefix): self.read(name) for name in self.tensors if name.startswith(prefix)}

    def fingerprint(self) -> str:
        """Return the identity of the checkpoint, see the function `fingerprint`; computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(essentials(self.config), sort_keys=True).encode())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            raw = self._file_of[name].raw(name)
            for begin, end in _sampled(len(raw)):
                digest.update(raw[begin:end])
        return digest.hexdigest()


def _sampled(num_bytes: int) -> list[tuple[int, int]]:
    """Return the byte ranges of a tensor that the checkpoint's fingerprint covers."""
    if num_bytes <= FINGERPRINT_WHOLE_BYTES:
        return [(0, num_bytes)]
    last = num_bytes - FINGERPRINT_PAGE_BYTES
    begins = [last * page // (FINGERPRINT_PAGES - 1) for page in range(FINGERPRINT_PAGES)]
    return [(begin, begin + FINGERPRINT_PAGE_BYTES) for begin in begins]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder; pickles beside them are ignored with a warning.

    Raises:
        ValueError: there are none, or files and index do not match.
    """
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if pickles and not found:
        raise ValueError(
            f"{folder} has its weights in pickles only ({', '.join(pickles)}): loading one runs code, so they are "
            "refused; convert them to safetensors"
        )
    if pickles:
        warnings.warn(f"{folder}: {', '.join(pickles)} is ignored, the weights are read from safetensors", stacklevel=2)
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        if found != [SINGLE_FILE]:
            raise ValueError(f"{folder} has neither {SINGLE_FILE} alone nor {INDEX_FILE}; safetensors there: {found}")
        return [folder / SINGLE_FILE]
    listed = sorted(set(_weight_map(index_path).values()))
    if listed != found:
        raise ValueError(f"{index_path} lists the files {listed}, but the folder has {found}")
    return [folder / name for name in listed]


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index_path} has no weight_map from tensor names to file names")
    return weight_map


def _check_index(index_path: Path, located: Mapping[str, SafetensorsFile]) -> None:
    weight_map = _weight_map(index_path)
    for name in sorted(weight_map.keys() | located.keys()):
        if name not in located:
            raise ValueError(f"missing tensor {name}: {index_path} lists it in {weight_map[name]}")
        actual = located[name].path.name
        if weight_map.get(name) != actual:
            raise ValueError(f"{name} is in {actual}, but {index_path} says {weight_map.get(name)}")


def _check_quantization(folder: Path, config: Mapping[str, Any], mxfp4_layers: frozenset[int]) -> None:
    """Refuse MXFP4 experts that the configuration does not announce, and the contrary: transformers follows it."""
    announced = config.get("quantization_config") is not None
    if announced != bool(mxfp4_layers):
        stored = "MXFP4" if mxfp4_layers else "plain"
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config is {'given' if announced else 'missing'}, but the experts "
            f"are stored as {stored} tensors"
        )


def check_tensors(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], mxfp4_layers: frozenset[int]
) -> None:
    """Compare tensors with those that the configuration implies.

    Raises:
        ValueError: a tensor is missing, unknown, mis-shaped or of a wrong kind of dtype; the message names it.
    """
    expected = tensor_shapes(config, mxfp4_layers)
    missing = [name for name in expected if name not in tensors]
    if missing:
        file = folder / (SINGLE_FILE if (folder / SINGLE_FILE).exists() else INDEX_FILE)
        more = f", and {len(missing) - 1} more: {', '.join(missing[1:6])}" if missing[1:] else ""
        raise ValueError(f"{file}: missing tensor {missing[0]} of shape {expected[missing[0]]}{more}")
    scale_shapes = ((), (1,), (whole(config, "num_key_value_heads"),))
    kv_scales = family_of(config).layer.kv_scales
    scale_names = {layer_prefix(layer) + name for layer in range(len(layer_blocks(config))) for name in kv_scales}
    for name, info in tensors.items():
        allowed = (expected[name],) if name in expected else scale_shapes if name in scale_names else ()
        if not allowed:
            raise ValueError(f"{info.file}: unknown tensor {name} of shape {info.shape}; config.json implies none")
        if info.shape not in allowed:
            sizes = _sizes_behind(config, allowed[0], info.shape)
            raise ValueError(
                f"{info.file}: {name} has shape {info.shape}, {folder / 'config.json'} implies {allowed[0]}{sizes}"
            )
        kind = "U8" if name.endswith(("_blocks", "_scales")) else "floating point"
        if (kind == "U8") != (info.dtype == "U8"):
            raise ValueError(f"{info.file}: {name} has dtype {info.dtype}; allowed: {kind}")
    for name in sorted(scale_names & tensors.keys()):
        partner = name[: -len("k_scale")] + ("v_scale" if name.endswith("k_scale") else "k_scale")
        if partner not in tensors:
            raise ValueError(f"{tensors[name].file}: {name} is there, but {partner} is missing")


def _sizes_behind(config: Mapping[str, Any], implied: Shape, stored: Shape) -> str:
    """Return the entries of a configuration that may be behind the dimensions in which two shapes differ."""
    differing = {size for axis, size in enumerate(implied) if axis >= len(stored) or stored[axis] != size}
    keys = [key for key, value in config.items() if type(value) is int and value in differing]
    if any(experts in differing for experts, _ in layer_blocks(config)) and "block_configs" in config:
        keys.append("block_configs")
    return f" ({', '.join(keys)})" if keys else ""


def fingerprint(folder: Path) -> str:
    """Return the identity of a checkpoint: sha256 over architecture and names, dtypes, shapes and bytes of tensors.

    Tensors up to 1 MiB (routers, norms, biases) count whole, larger ones by 16 pages of 4 KiB spread evenly over them,
    which is cheap at any size (120B: under 200 MiB read). The split into files does not matter; the order of experts
    does.

    Raises:
        ValueError: the folder is not a valid checkpoint.
    """
    return Checkpoint(folder).fingerprint()
