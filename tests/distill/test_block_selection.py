"""Which blocks and tensors train: halves, wholes, patterns, and tensors that the parent stores as MXFP4."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.released_twin import write_released_twin
from helpers.trained_libraries import one_trained
from safetensors.torch import save_file

from lit_puzzle.distill.block_selection import check_blocks, select_blocks, write_library
from lit_puzzle.distill.settings import BlockTrainingSettings
from lit_puzzle.library.library import Candidate, Library, candidate_name
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.spec import BlockSpec

ALL, FEW = tuple(range(8)), (1, 4)
ROUTER = {"mlp.router.weight", "mlp.router.bias"}


def library_of(config: Any) -> Library:
    """Layer 0 has a window; layer 1 has candidates with one."""
    blocks = [[BlockSpec(ALL, 8), BlockSpec(FEW, 8)], [BlockSpec(e, w) for w in (None, 4) for e in (ALL, FEW)]]
    layers = tuple(tuple(Candidate(candidate_name(row[0], b), b) for b in row) for row in blocks)
    return Library("parent", 8, config.to_dict(), layers)


def chosen(
    config: Any, sub_blocks: Any, patterns: Any = None, **options: Any
) -> dict[str, tuple[set[str], bool, bool]]:
    before = options.pop("trained_before", {})
    settings = BlockTrainingSettings(sub_blocks=sub_blocks, tensors=patterns, **options)
    blocks = select_blocks(Path("library"), library_of(config), settings, before)
    return {block.title: (set(block.tensors), block.attention, block.experts) for block in blocks}


def test_halves_train_what_pruning_changed(tiny_config: Any) -> None:
    config = tiny_config(num_hidden_layers=2)
    found = chosen(config, "apart")
    attention = {f"self_attn.{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")}
    attention.add("self_attn.sinks")
    assert found == {
        "0/experts=2": (ROUTER, False, True),
        "1/experts=2": (ROUTER, False, True),
        "1/window=4": (attention, True, False),
    }
    assert chosen(config, "together") == found | {"1/experts=2,window=4": (ROUTER | attention, True, True)}
    assert list(chosen(config, "apart", layers=[1])) == ["1/experts=2", "1/window=4"]


def test_patterns_reach_a_half_only_where_it_is_apart(tiny_config: Any) -> None:
    config, sinks = tiny_config(num_hidden_layers=2), "self_attn.sinks"
    patterns = ["mlp.router.*", sinks, "input_layernorm.weight"]
    apart = chosen(config, "apart", patterns)
    assert apart["1/experts=2"] == (ROUTER, False, True)
    assert apart["1/window=4"] == ({sinks, "input_layernorm.weight"}, True, False)
    together = chosen(config, "together", patterns)
    assert together["1/window=4"] == together["0/experts=2"] == (ROUTER | {sinks, "input_layernorm.weight"}, True, True)
    assert list(chosen(config, "apart", [sinks])) == ["1/window=4"]
    before = {(0, "experts=2"): ["mlp.router.bias"]}
    assert chosen(config, "apart", [sinks], trained_before=before)["0/experts=2"] == ({"mlp.router.bias"}, False, True)


def test_experts_in_mxfp4_cannot_train(tmp_path: Path) -> None:
    parent = Checkpoint(write_released_twin(tmp_path / "twin"))
    library = one_trained(tmp_path / "library", parent, {"mlp.router.bias": torch.zeros(2)})
    for patterns, message in ((["mlp.experts.*"], r"mlp\.experts\.gate_up_proj is not in .*MXFP4"), (None, None)):
        blocks = select_blocks(tmp_path, library, BlockTrainingSettings(tensors=patterns), {})
        if message is None:
            check_blocks(tmp_path / "library", parent, library, blocks)
            continue
        with pytest.raises(ValueError, match=message):
            check_blocks(tmp_path / "library", parent, library, blocks)


def test_files_of_blocks_that_did_not_train_are_kept(tmp_path: Path) -> None:
    """An existing target is replaced; a process that does not write still iterates over every tensor."""
    parent = Checkpoint(write_released_twin(tmp_path / "twin"))
    library = one_trained(tmp_path / "library", parent, {"mlp.router.bias": torch.arange(2.0)})
    write_library(tmp_path / "new", tmp_path / "library", library, parent, [], is_writer=True)
    assert Library.load(tmp_path / "new") == library
    block = select_blocks(tmp_path, library, BlockTrainingSettings(), {})[0]
    pairs = iter([(block, {"mlp.router.bias": torch.ones(2)})])
    write_library(tmp_path / "none", tmp_path / "library", library, parent, pairs, is_writer=False)
    assert next(pairs, None) is None and not (tmp_path / "none").exists()
    trained = [(block, {"mlp.router.bias": torch.tensor([0.1, 0.2])})]
    write_library(tmp_path / "new", tmp_path / "library", library, parent, trained, is_writer=True)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"library.json", block.file_name}
    save_file({"mlp.router.bias": torch.tensor([0.1, 0.2]).bfloat16()}, tmp_path / "expected.safetensors")
    assert (tmp_path / "new" / block.file_name).read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
