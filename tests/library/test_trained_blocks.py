"""Trained tensors of a plan: found by block, copied into the child byte for byte, refused where they do not fit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.released_twin import write_released_twin
from helpers.trained_libraries import KEPT, one_trained
from safetensors.torch import save_file

from lit_puzzle.child.assemble import assemble
from lit_puzzle.library.library import Candidate, Library
from lit_puzzle.library.trained_blocks import check_trained, plan_tensors, trained_tensors
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.search.plan_record import trained_files
from lit_puzzle.spec import BlockSpec, Plan


def plan_of(library: Library) -> Plan:
    return library.plan([row[-1].name for row in library.layers])


def test_trained_tensors_are_read_and_unknown_ones_refused(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    config, block = tiny_config().to_dict(), BlockSpec((1, 4), None)
    candidate = Candidate("experts=2", block, "layer1.safetensors")
    good = {"mlp.router.weight": torch.ones(2, 32), "mlp.experts.down_proj": torch.ones(2, 8, 32)}
    save_file(good, tmp_path / "layer1.safetensors")
    check_trained(tmp_path, config, candidate)
    read = trained_tensors(tmp_path, config, candidate)
    assert read.keys() == good.keys() and all(torch.equal(read[name], good[name]) for name in good)
    assert trained_tensors(tmp_path, config, Candidate("experts=2", block)) == {}
    save_file({"mlp.router.weight": torch.ones(8, 32)}, tmp_path / "layer1.safetensors")
    for read_tensors in (check_trained, trained_tensors):
        with pytest.raises(ValueError, match=r"mlp.router.weight has shape \(8, 32\).*needs \(2, 32\)"):
            read_tensors(tmp_path, config, candidate)
    save_file({"mlp.gate.weight": torch.ones(2, 32)}, tmp_path / "layer1.safetensors")
    with pytest.raises(ValueError, match=r"no layer has a tensor mlp\.gate\.weight"):
        check_trained(tmp_path, config, candidate)


def test_a_trained_router_beside_experts_in_mxfp4(tmp_path: Path) -> None:
    parent = Checkpoint(write_released_twin(tmp_path / "twin"))
    shape = parent.layer(1)["mlp.router.weight"].shape
    rows = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0))
    library = one_trained(tmp_path / "library", parent, {"mlp.router.weight": rows})
    plan_of(library).save(tmp_path / "plan.json")
    assemble(tmp_path / "run", parent.folder, plan=tmp_path / "plan.json", library=tmp_path / "library")
    child, before = Checkpoint(tmp_path / "run" / "child").layer(1), parent.layer(1)
    assert child["mlp.router.weight"].dtype == torch.bfloat16
    assert torch.equal(child.pop("mlp.router.weight"), rows.bfloat16())
    for name, tensor in child.items():
        rows_of = ".experts." in name or ".router." in name
        assert torch.equal(tensor, before[name][list(KEPT)] if rows_of else before[name]), name


def test_experts_are_never_quantized_again(tmp_path: Path) -> None:
    parent = Checkpoint(write_released_twin(tmp_path / "twin"))
    down = {"mlp.experts.down_proj": torch.zeros(2, parent.config["intermediate_size"], parent.config["hidden_size"])}
    library = one_trained(tmp_path / "library", parent, down)
    with pytest.raises(ValueError, match=r"layer 1 has a trained mlp\.experts\.down_proj, which .* in another form"):
        plan_tensors(parent, plan_of(library), tmp_path / "library")


def test_a_plan_of_other_blocks_and_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    parent = Checkpoint(write_released_twin(tmp_path / "twin"))
    wide = {"mlp.router.bias": torch.zeros(3)}
    library = one_trained(tmp_path / "library", parent, wide)
    with pytest.raises(ValueError, match=r"mlp\.router\.bias has shape \(3,\); a layer with 2 experts needs \(2,\)"):
        plan_tensors(parent, plan_of(library), tmp_path / "library")
    plan = library.plan(["parent"] * library.num_layers)
    assert plan_tensors(parent, plan, tmp_path / "library") == {}
    other = BlockSpec((1, 2), plan.blocks[1].window_tokens)
    blocks = (plan.blocks[0], other, *plan.blocks[2:])
    with pytest.raises(ValueError, match=r"has no candidate with the plan's 2 experts and window .* in layer 1"):
        plan_tensors(parent, Plan(plan.parent_fingerprint, plan.num_parent_experts, blocks), tmp_path / "library")


def test_a_searched_plan_does_not_lose_its_trained_blocks(tmp_path: Path) -> None:
    parent = Checkpoint(write_released_twin(tmp_path / "twin"))
    rows = torch.zeros(2, *parent.layer(1)["mlp.router.weight"].shape[1:])
    library = one_trained(tmp_path / "library", parent, {"mlp.router.weight": rows})
    untrained, chosen = (["parent"] * library.num_layers for _ in range(2))
    chosen[1] = library.layers[1][-1].name
    for names, files in ((untrained, []), (chosen, ["layer1.safetensors"])):
        assert trained_files(library, names) == files
        record = {"plan": library.plan(names).to_json(), "library": "LIBRARY", "trained_files": files}
        (tmp_path / "plan.json").write_text(json.dumps(record))
        if files:
            with pytest.raises(ValueError, match=r"1 files of LIBRARY\); .* Add --library=LIBRARY"):
                assemble(tmp_path / "run", parent.folder, plan=tmp_path / "plan.json")
        else:
            assemble(tmp_path / "run", parent.folder, plan=tmp_path / "plan.json")


def test_a_combination_takes_the_tensors_of_its_halves(tmp_path: Path) -> None:
    parent = Checkpoint(write_released_twin(tmp_path / "twin"))
    library = one_trained(tmp_path / "library", parent, {"mlp.router.weight": torch.zeros(2, 64)})
    own, half = library.layers[1]
    block = BlockSpec(KEPT, 3)
    both, window = Candidate("experts=2,window=3", block), Candidate("window=3", BlockSpec(own.block.experts, 3), "w")
    row = (own, half, window, both)
    grown = replace(library, layers=(library.layers[0], row, *library.layers[2:]))
    assert grown.trained(1, both) == (half, window)
    assert grown.trained(1, half) == (half,) and grown.trained(1, own) == ()
    whole = replace(both, weights="both")
    assert replace(grown, layers=(grown.layers[0], (*row[:3], whole), *grown.layers[2:])).trained(1, whole) == (whole,)
