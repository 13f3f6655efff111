"""Memory of an export at several sizes: a buffer for copied tensors, one expert matrix for converted ones."""

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.anonymous_memory import peak_bytes

from lit_puzzle.model.layout import tensor_shapes
from lit_puzzle.model.writer import write_checkpoint
from lit_puzzle.serve import plan_picture
from lit_puzzle.serve.export import export
from lit_puzzle.serve.settings import Storage

WORDS = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_parent"
EXPERTS = 8


def write_checkpoint_of(folder: Path, layers: int, inner: int, packed: bool) -> Path:
    """Write a checkpoint with experts of 2 x inner x 256 values."""
    config: dict[str, Any] = {"model_type": "gpt_oss", "num_hidden_layers": layers, "num_local_experts": EXPERTS}
    config |= {"hidden_size": 256, "intermediate_size": inner, "head_dim": 8, "num_attention_heads": 2}
    config |= {"vocab_size": 64, "num_key_value_heads": 1, "num_experts_per_tok": 2, "sliding_window": 8}
    config |= {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    if packed:
        config["quantization_config"] = {"quant_method": "mxfp4"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config, range(layers) if packed else ())
    layout = {n: ("U8" if n.endswith(("_blocks", "_scales")) else "BF16", shape) for n, shape in shapes.items()}
    kinds = {"U8": torch.uint8, "BF16": torch.bfloat16}
    tensors = ((name, torch.ones(shape, dtype=kinds[code])) for name, (code, shape) in layout.items())
    write_checkpoint(folder, layout, tensors)
    return folder


def peaks(tmp_path: Path, packed: bool, storage: Storage = Storage()) -> dict[str, int]:  # noqa: B008  (frozen)
    sizes = {"shallow": (1, 512), "deep": (3, 512), "wide": (1, 2048)}
    plan_picture.draw_blocks(tmp_path / "warm.png", [(1, None)], None)  # so that matplotlib's memory is not counted
    found = {}
    for name, (layers, inner) in sizes.items():
        source = write_checkpoint_of(tmp_path / name, layers, inner, packed)
        work = partial(export, tmp_path / f"{name} run", source, tokenizer=WORDS, storage=storage)
        found[name] = peak_bytes(work)
    return found


@pytest.fixture(scope="module")
def fresh() -> Iterator[ProcessPoolExecutor]:
    """A new process to fork from, whose heap other tests have not changed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.slow
def test_copying_takes_a_buffer_whatever_the_size(tmp_path: Path, fresh: ProcessPoolExecutor) -> None:
    """An expert has 256 thousand values when shallow or deep, a million when wide."""
    assert max(fresh.submit(peaks, tmp_path, packed=True).result().values()) < 6_000_000


@pytest.mark.slow
def test_packing_takes_one_matrix_of_a_layer(tmp_path: Path, fresh: ProcessPoolExecutor) -> None:
    found = fresh.submit(peaks, tmp_path, packed=False, storage=Storage(experts="mxfp4")).result()
    values, slack = 2 * 512 * 256, 4_000_000
    formula = EXPERTS * values * 17 / 32 + 22 * values
    assert found["shallow"] < formula + slack and found["deep"] < formula + slack
    assert 2 * formula < found["wide"] < 4 * formula + slack


@pytest.mark.slow
def test_unpacking_takes_one_matrix_of_a_layer(tmp_path: Path, fresh: ProcessPoolExecutor) -> None:
    found = fresh.submit(peaks, tmp_path, packed=True, storage=Storage(experts="plain")).result()
    values, slack = 2 * 512 * 256, 4_000_000
    formula = 2 * EXPERTS * values + max(2 * EXPERTS, 20) * values
    assert found["shallow"] < formula + slack and found["deep"] < formula + slack
    assert 2 * formula < found["wide"] < 4 * formula + slack
