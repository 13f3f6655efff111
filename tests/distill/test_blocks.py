"""Blockwise distillation as a run: independent blocks, a library that scores better, and a child made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.block_runs import KEPT, Inputs, fit, library_bytes, make_inputs, make_library, make_module
from helpers.recovery_runs import forked
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file

from lit_puzzle.child.assemble import assemble
from lit_puzzle.distill.settings import BlockTrainingSettings
from lit_puzzle.library.library import LIBRARY_FILE, Library
from lit_puzzle.library.swap import swapped
from lit_puzzle.library.trained_blocks import check_trained, trained_tensors
from lit_puzzle.model.blocks import with_own_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.gpt_oss import GptOssPuzzleForCausalLM
from lit_puzzle.model.loading import load_model
from lit_puzzle.scoring.replace_block import ReplaceOneBlock, lay_out
from lit_puzzle.scoring.settings import Memory

STEPS = 40
IDS = torch.randint(3, 110, (4, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("bld"), tiny_config)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, inputs: Inputs) -> Path:
    folder = tmp_path_factory.mktemp("run") / "apart"
    run_apart(folder, inputs, STEPS, clip_norm=1.0)
    return folder


def run_apart(*arguments: Any, **settings: Any) -> None:
    """A fit in a process of its own: the process group that it opens must not stay in this one."""
    assert forked(1, lambda rank: fit(*arguments, **settings)) == [0]


def parent_model(inputs: Inputs) -> GptOssPuzzleForCausalLM:
    return with_own_blocks(load_model(inputs.parent, "float32", "sink_attention")).requires_grad_(False).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_every_loss_falls_and_is_reported(run: Path) -> None:
    results = torch.load(run / "results.pt")
    titles = {"0/experts=4", "0/experts=2", "1/experts=4", "1/experts=2", "1/window=4", "mean"}
    assert {key.split("/", 1)[1].rsplit("/", 1)[0] for key in results if key.startswith("loss/")} == titles
    for title in titles:
        assert 0 < results[f"loss/{title}/last"] < results[f"loss/{title}/first"], title
    assert results["val_loss/mean/last"] < results["val_loss/mean/first"]


def test_the_library_contains_the_trained_tensors_and_scores_better(inputs: Inputs, run: Path) -> None:
    library, model = Library.load(run / "library"), parent_model(inputs)
    batches = [row[None].tolist() for row in IDS]
    scorer = ReplaceOneBlock(model, lay_out(batches, 0, 1), 4, Memory(), Path("unused"), lambda tensor: tensor)
    scorer.start(0)
    for layer, (parent, *candidates) in enumerate(library.layers):
        assert parent.weights is None
        scorer.advance(layer)
        for candidate in candidates:
            check_trained(run / "library", library.config, candidate)
            tensors = trained_tensors(run / "library", library.config, candidate)
            if "," in candidate.name:
                assert tensors == {}  # its halves have them
                continue
            router = candidate.name.startswith("experts")
            assert all(name.startswith("mlp.router." if router else "self_attn.") for name in tensors)
            assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
            before, after = (scorer.quality_loss(candidate.block, given)["kl"] for given in ({}, tensors))
            assert sum(after) < sum(before), candidate.name


def test_a_child_is_made_of_the_trained_blocks(inputs: Inputs, run: Path, tmp_path: Path) -> None:
    """A combination takes the tensors of both its halves; its logits are those of the blocks in the parent."""
    library = Library.load(run / "library")
    library.plan(["parent", "experts=2,window=4"]).save(tmp_path / "plan.json")
    assemble(tmp_path / "trained", inputs.parent, plan=tmp_path / "plan.json", library=run / "library")
    assemble(tmp_path / "cut", inputs.parent, plan=tmp_path / "plan.json", library=inputs.library)
    assemble(tmp_path / "plain", inputs.parent, plan=tmp_path / "plan.json")
    weights = [(tmp_path / kind / "child" / "model.safetensors").read_bytes() for kind in ("trained", "cut", "plain")]
    assert weights[0] != weights[1] == weights[2]
    halves = [library.candidate(1, name) for name in ("experts=2", "window=4")]
    tensors = {k: v for half in halves for k, v in trained_tensors(run / "library", library.config, half).items()}
    child = Checkpoint(tmp_path / "trained" / "child").layer(1)
    assert {"mlp.router.weight", "self_attn.q_proj.weight", "self_attn.sinks"} <= tensors.keys()
    assert all(torch.equal(child[name], tensor) for name, tensor in tensors.items())
    others = Checkpoint(inputs.parent).layer(1)
    assert torch.equal(child["mlp.experts.down_proj"], others["mlp.experts.down_proj"][list(KEPT[2])])
    model, made = parent_model(inputs), load_model(tmp_path / "trained" / "child", "float32", "sink_attention").eval()
    alone = logits(model)
    with swapped(model, 1, library.candidate(1, "experts=2,window=4").block, tensors):
        torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(made) - alone).abs().max() > 1e-2


@pytest.mark.slow
def test_blocks_are_independent_of_each_other(inputs: Inputs, tmp_path: Path) -> None:
    """Layer by layer, each run from the library of the one before, gives the bytes of all at once."""
    run_apart(tmp_path / "all", inputs, 4)
    run_apart(tmp_path / "first", inputs, 4, training=BlockTrainingSettings(layers=[1]))
    again = inputs._replace(library=tmp_path / "first" / "library")
    run_apart(tmp_path / "second", again, 4, training=BlockTrainingSettings(layers=[0]))
    assert library_bytes(tmp_path / "second") == library_bytes(tmp_path / "all")
    assert library_bytes(tmp_path / "first").keys() < library_bytes(tmp_path / "all").keys()


class StepLengths(Callback):
    """How far each update moves each block."""

    def __init__(self) -> None:
        self.lengths: list[list[float]] = []

    def _now(self, pl_module: Any) -> list[torch.Tensor]:
        return [torch.cat([p.detach().flatten() for p in block.parameters()]) for block in pl_module.blocks]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before = self._now(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pairs = zip(self._now(pl_module), self.before, strict=True)
        self.lengths.append([float((now - before).norm()) for now, before in pairs])


def test_each_block_is_clipped_by_itself_and_the_schedule_counts_updates(inputs: Inputs, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        watch = StepLengths()
        plain: dict[str, Any] = {
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
            "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        }
        fit(tmp_path / "run", inputs, 2, callbacks=[watch], clip_norm=1e-3, **plain)
        assert watch.lengths[0] == pytest.approx([5e-4] * 5, rel=1e-2)
        assert watch.lengths[1] == pytest.approx([2.5e-4] * 5, rel=1e-2)

    assert forked(1, work) == [0]


def test_together_every_candidate_has_its_own_file(inputs: Inputs, tmp_path: Path) -> None:
    wholes = BlockTrainingSettings(sub_blocks="together", tensors=["self_attn.q_proj.*", "mlp.router.*"])
    run_apart(tmp_path / "run", inputs, 4, training=wholes)
    library = Library.load(tmp_path / "run" / "library")
    pair = library.candidate(1, "experts=4,window=4")
    names = {"self_attn.q_proj.weight", "self_attn.q_proj.bias", "mlp.router.weight", "mlp.router.bias"}
    assert trained_tensors(tmp_path / "run" / "library", library.config, pair).keys() == names
    assert all(
        (candidate.weights is None) == (candidate.name == "parent") for row in library.layers for candidate in row
    )
    assert torch.load(tmp_path / "run" / "results.pt").keys() >= {f"loss/1/{pair.name}/first", "loss/1/window=4/last"}


def test_training_of_earlier_tensors_continues(inputs: Inputs, run: Path, tmp_path: Path) -> None:
    """From the trained library the loss starts where it ended, also of tensors outside the patterns."""
    again = inputs._replace(library=run / "library")
    run_apart(tmp_path / "again", again, 1, training=BlockTrainingSettings(tensors=["post_attention_layernorm.*"]))
    before, after = torch.load(run / "results.pt"), torch.load(tmp_path / "again" / "results.pt")
    assert after["loss/0/experts=4/first"] < 0.8 * before["loss/0/experts=4/first"]
    names = load_file(tmp_path / "again" / "library" / "layer=1,experts=2.safetensors").keys()
    assert names == {"mlp.router.weight", "mlp.router.bias", "post_attention_layernorm.weight"}


def test_a_loss_that_is_not_finite_stops_by_name(inputs: Inputs, run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "library"
    broken.mkdir()
    for name, content in library_bytes(run).items():
        (broken / name).write_bytes(content)
    file = broken / "layer=1,window=4.safetensors"
    save_file({name: torch.full_like(tensor, 3e38) for name, tensor in load_file(file).items()}, file)

    def stops(rank: int) -> None:
        with pytest.raises(ValueError, match=r"loss of 'window=4' of layer 1 is not finite at step 0; the batch is in"):
            fit(tmp_path / "run", inputs._replace(library=broken), 2)

    assert forked(1, stops) == [0]
    kept = torch.load(tmp_path / "run" / "broken_batch_0.pt")
    assert kept["batch"]["input_ids"].shape == (2, 32) and int((~kept["losses"].isfinite()).sum()) == 1
    assert not (tmp_path / "run" / "library").exists()


def test_impossible_settings_are_refused_at_once(inputs: Inputs, tmp_path: Path) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            make_module(inputs, **settings)

    blocks = BlockTrainingSettings
    refused(r"layers \[0, 2\] were given; the library has layers 0\.\.1", training=blocks(layers=[2, 0]))
    refused(r"tensors: 'mlp\.gate\.\*' matches no tensor of a layer", training=blocks(tensors=["mlp.gate.*"]))
    refused("nothing to train in layers .0.", training=blocks(tensors=["self_attn.*"], layers=[0]))
    refused("clip_norm=0 was given", clip_norm=0)
    with pytest.raises(ValueError, match=r"sub_blocks is 'halves'; allowed: \['apart', 'together'\]"):
        blocks(sub_blocks="halves")  # type: ignore[arg-type]
    record = json.loads((inputs.library / LIBRARY_FILE).read_text())
    record["layers"][1] = [c for c in record["layers"][1] if c["name"] != "window=4"]
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / LIBRARY_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"'experts=4,window=4' cannot be made of halves.*lacks \['window=4'\]"):
        make_module(inputs._replace(library=lacking))


def test_a_library_of_another_parent_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    model = load_model(inputs.parent, "bfloat16")
    model.model.layers[0].mlp.router.bias.data.add_(1.0)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="The library is of parent"):
        make_module(inputs._replace(parent=tmp_path / "other"))
    make_library(tmp_path / "library", inputs.parent).plan(["parent", "window=4"]).save(tmp_path / "plan.json")
    make_library(tmp_path / "others", tmp_path / "other")
    with pytest.raises(ValueError, match="The library is of parent"):
        assemble(tmp_path / "run", inputs.parent, plan=tmp_path / "plan.json", library=tmp_path / "others")
