"""block_timing.py: what is timed is what a model does (same outputs, same caches), and the script end to end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lit_puzzle.costs.block_timing import Bench, measure
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import EngineMemory, ServingEngine
from lit_puzzle.costs.filled_cache import filled_cache, same_cache
from lit_puzzle.costs.machine import Machine, Points
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Block, Setting, parent_blocks
from lit_puzzle.costs.timed_blocks import AXES, TimedBlocks
from lit_puzzle.spec import Scenario

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "lit_puzzle" / "assets" / "tiny_parent" / "config.json"
SMALL = Points(experts=[16, 8], windows=[16, None], batches=[1, 4], contexts=[8, 32], prompts=[8, 32])


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(CONFIG.read_text())
    return loaded


@pytest.fixture
def bench(config: dict[str, Any]) -> Bench:
    torch.manual_seed(0)
    return Bench(config, Machine("cpu", torch.float32, copies=2, rounds=1))


@pytest.mark.parametrize("window", [16, None])
@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 40])
@torch.inference_mode()
def test_a_decode_step_continues_a_prompt(bench: Bench, window: int | None, tokens: int) -> None:
    """The last token over the cache of the others has the output that it has at the end of the whole prompt."""
    block = Block(8, window)
    config = bench.child_config([block] * 2)
    hidden = bench.machine.random(3, tokens, config.hidden_size)
    whole: Any = bench._through_layers(config, block, [hidden], DynamicCache(config=config))()
    cache = DynamicCache(config=config)
    places = torch.arange(tokens - 1)[None]
    prompt = hidden[:, :-1]
    for layer in bench._copies(config, block):  # fills the cache as a model would
        prompt = bench_layer(bench, config, block, layer, prompt, places, cache)
    step = bench._through_layers(config, block, [hidden[:, -1:]], cache)
    for _ in range(2):  # the first step leaves the cache as it was
        torch.testing.assert_close(step(), whole[:, -1:], rtol=1e-4, atol=1e-5)
    made = filled_cache(config, 3, tokens - 1, bench.machine)
    shapes = [(layer.keys.shape, layer.values.shape, layer.get_seq_length()) for layer in cache.layers]
    assert [(layer.keys.shape, layer.values.shape, layer.get_seq_length()) for layer in made.layers] == shapes


def bench_layer(
    bench: Bench, config: Any, block: Block, layer: Any, hidden: torch.Tensor, places: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """One layer as transformers' own model calls it: masks from its own builder."""
    model = bench._model(with_layers=True).model
    mask = model.attention_masks(hidden, None, DynamicCache(config=model.config), places)[block.window_tokens]
    rotation = model.rotary_emb(hidden, places)
    out: torch.Tensor = layer(
        hidden, attention_mask=mask, position_embeddings=rotation, past_key_values=cache, use_cache=True
    )
    return out


@torch.inference_mode()
def test_tokens_go_to_many_experts(bench: Bench) -> None:
    config = bench.child_config([Block(16, None)] * 2)
    layer = bench._copies(config, Block(16, None))[0]
    hidden = layer.post_attention_layernorm(bench.machine.random(1, 64, config.hidden_size))
    _, _, chosen = layer.mlp.router(hidden.flatten(0, 1))
    assert len(chosen.unique()) >= 14  # 128 picks of 16; with a dominant bias they would be 2


@torch.inference_mode()
def test_the_rest_is_the_model_without_its_layers(bench: Bench) -> None:
    """With identity layers the next token is the argmax of the head over the normalized embedding."""
    step = bench.decode_model(3, 20, with_layers=False)
    model = bench._model(with_layers=False)
    seen: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    next_tokens: Any = step()
    assert [ids.shape for ids in seen] == [(3, 1)]
    hidden = model.model.norm(model.model.embed_tokens(seen[0]))
    assert torch.equal(next_tokens, model.lm_head(hidden)[:, -1].argmax(-1))
    assert model.model.embed_tokens.weight.shape == (128, 96)


@pytest.mark.parametrize(("batch", "context"), [(2, 30), (6, 200)])
def test_cache_takes_the_bytes_that_the_docstring_states(bench: Bench, batch: int, context: int) -> None:
    for window in (16, None):
        config = bench.child_config([Block(8, window)] * 2)
        cache = filled_cache(config, batch, context - 1, bench.machine)
        used = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        stated = 2 * batch * 2 * 2 * 32 * min(window or context, context) * 4
        assert 0.9 * stated < used <= stated


def test_a_copied_cache_leaves_the_original(bench: Bench) -> None:
    config = bench.child_config([Block(8, 16), Block(8, None)])
    cache = filled_cache(config, 2, 30, bench.machine)
    twin = same_cache(cache)
    new = bench.machine.random(2, 2, 1, 32)
    for index in range(2):
        twin.update(new, new, index)
    assert [layer.get_seq_length() for layer in cache.layers] == [30, 30]
    assert [layer.get_seq_length() for layer in twin.layers] == [31, 31]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [15, 30]


def test_every_combination_is_measured_once(bench: Bench) -> None:
    rows = measure(bench, SMALL, whole_model=True)
    assert set(rows) == {*AXES, "whole_model"}
    decodes = [tuple(row[key] for key in ("window_tokens", *AXES["decode_layer"])) for row in rows["decode_layer"]]
    expected: set[tuple[int | None, ...]] = {(None, e, b, c) for e in (16, 8) for b in (1, 4) for c in (8, 32)}
    expected |= {(16, e, b, c) for e in (16, 8) for b in (1, 4) for c in (8, 16)}
    assert len(decodes) == len(expected) and set(decodes) == expected
    assert len(rows["prefill_layer"]) == 8 and len(rows["decode_rest"]) == 2 and len(rows["whole_model"]) == 4
    seconds = {kind: [float(row["seconds"] or 0) for row in found] for kind, found in rows.items()}
    assert all(min(found) > 0 for found in seconds.values())
    # six layers and the rest: neither is most of the other, whatever the machine
    assert min(seconds["decode_layer"]) < min(seconds["whole_model"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": []}, "experts must be numbers of at least 1"),
        ({"contexts": [1]}, "contexts must be numbers of at least 2"),
        ({"windows": []}, "windows must be numbers of at least 2, or none"),
        ({"windows": [1, None]}, "windows must be numbers of at least 2, or none"),
        ({"windows": [0]}, "windows must be numbers of at least 2, or none"),
    ],
)
def test_bad_points_are_refused(changes: dict[str, list[int]], message: str) -> None:
    settings: dict[str, Any] = {"experts": [8], "windows": [None], "batches": [1], "contexts": [8], "prompts": [8]}
    with pytest.raises(ValueError, match=message):
        Points(**(settings | changes))


@pytest.mark.slow
def test_script_writes_a_table_that_the_cost_model_reads(tmp_path: Path, config: dict[str, Any]) -> None:
    out = tmp_path / "blocks.json"
    words = (
        f"--config {CONFIG} --experts 16 8 --windows 16 none --batches 1 2 --contexts 8 24 --prompts 8 16 --rounds 1"
    )
    command = [sys.executable, str(ROOT / "scripts" / "measure_blocks.py"), *words.split(), "--copies", "1"]
    done = subprocess.run([*command, "--out", str(out), "--whole-model"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predicted") == 4
    times = TimedBlocks(out)
    assert times.header["gpu"] == "cpu" and times.header["dtype"] == "float32"
    assert times.header["hardware"]["threads"] == 1 and times.header["versions"]["torch"] == torch.__version__
    scenario = Scenario("cpu", 1, 8, 16, 2, "float32", 1, 1, "float32", "float32")
    cost = CostModel(
        ModelShape.from_config(config), scenario, times, ServingEngine(memory=EngineMemory(reserved_gib=0.0))
    )
    (deployment,) = cost.deployments()
    setting = Setting(cost.model, scenario, deployment, cost.engine)
    blocks = parent_blocks(config)
    steps = [
        times.decode_rest(setting, 2) + sum(times.decode_layer(setting, block, 2, context) for block in blocks)
        for context in (8, 16, 24)  # linear from 8 to 24, windows bend at 16
    ]
    assert min(steps) * 0.999 <= cost.predict(blocks, deployment, 2).step_seconds <= max(steps) * 1.001
    with pytest.raises(ValueError, match=r"not for 32.*--contexts 8 24 32 --prompts"):
        times.decode_layer(setting, Block(16, None), 1, 32)
