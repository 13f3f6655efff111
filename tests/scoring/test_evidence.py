"""evidence.py: shares of tokens that could tell, against what really changes when a block is replaced."""

from pathlib import Path

import pytest
import torch

from lit_puzzle.library.swap import swapped
from lit_puzzle.model.blocks import with_own_blocks
from lit_puzzle.scoring.evidence import Routed, item_share, unjudged, window_share
from lit_puzzle.scoring.replace_block import ReplaceOneBlock, lay_out
from lit_puzzle.scoring.score_files import Entry
from lit_puzzle.scoring.settings import Memory
from lit_puzzle.spec import BlockSpec

ALL = tuple(range(8))
ROWS = [list(range(3, 23)), list(range(40, 49)), list(range(60, 64))]


def entry(layer: int, experts: tuple[int, ...], window: int | None = None) -> Entry:
    name = f"experts={len(experts)}" if len(experts) < 8 else f"window={window}"
    return Entry(layer, name, name.split("=")[0], BlockSpec(experts, window), None)


@pytest.mark.parametrize("window", [1, 4, 9, 19, 20])
@torch.no_grad()
def test_tokens_that_a_window_changes(tiny_model, window: int) -> None:
    """The share of tokens whose states differ, in every sequence from its start."""
    model, layer = with_own_blocks(tiny_model), 1
    changed = total = 0
    for row in ROWS:
        ids = torch.tensor([row])
        before = model.model(input_ids=ids).last_hidden_state[0]
        with swapped(model, layer, BlockSpec(ALL, window)):
            after = model.model(input_ids=ids).last_hidden_state[0]
        changed += int(((before - after).abs().amax(-1) > 1e-6).sum())
        total += len(row)
    assert window_share([(len(row), 0) for row in ROWS], window) == changed / total


def test_tokens_of_prompts_are_not_counted() -> None:
    # Scored are places 4 .. 8 of 10 tokens after a prompt of 5; a window of 6 changes places 6, 7 and 8.
    assert window_share([(10, 5)], 6) == 3 / 5
    assert window_share([(10, 5)], 9) == 0.0 and window_share([(10, 5)], None) == 1.0
    assert window_share([(3, 3)], 1) == 0.0  # nothing was generated
    assert item_share([10, 20, 30, 40], 20) == 0.5 and item_share([10], None) == 1.0


@torch.no_grad()
def test_tokens_that_are_routed_to_a_pruned_expert(tiny_model, tmp_path: Path) -> None:
    model = with_own_blocks(tiny_model)
    batches = [ROWS[:2], ROWS[2:]]
    seen: list[set[int]] = [set() for _ in range(4)]
    chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(4)}
    for row in ROWS:
        hooks = [
            model.model.layers[layer].mlp.router.register_forward_hook(
                lambda _m, _i, output, layer=layer: chosen[layer].append(output[2])
            )
            for layer in chosen
        ]
        model.model(input_ids=torch.tensor([row]))
        for hook in hooks:
            hook.remove()
    routes = {layer: torch.cat(found) for layer, found in chosen.items()}
    for layer, experts in routes.items():
        seen[layer] = set(experts.flatten().tolist())
    never = [(layer, expert) for layer in range(4) for expert in ALL if expert not in seen[layer]]
    entries = [entry(0, (0, 1, 2, 3)), entry(2, (4, 5))]
    entries += [entry(layer, tuple(e for e in ALL if e != expert)) for layer, expert in never[:1]]
    routed = Routed(model, entries)
    scorer = ReplaceOneBlock(model, lay_out(batches, 0, 1), 3, Memory(), tmp_path / "scratch", lambda tensor: tensor)
    scorer.start(0, routed)
    shares = routed.shares(lambda tensor: tensor)
    for each in entries:
        kept = torch.tensor(each.block.experts)
        expected = (~torch.isin(routes[each.layer], kept)).any(-1).double().mean()
        assert shares[each] == pytest.approx(float(expected))
    assert 0 < shares[entries[0]] <= 1


def test_candidates_that_cannot_be_judged_are_named_with_their_layers() -> None:
    shares = {entry(1, ALL, 256): 0.0, entry(3, ALL, 256): 0.0, entry(1, ALL, 16): 0.5}
    assert unjudged(shares, "scored tokens") == (
        "these candidates get no score, none of the scored tokens can tell: window=256 in layers 1, 3"
    )
    assert unjudged({entry(1, ALL, 16): 0.5}, "scored tokens") == ""
