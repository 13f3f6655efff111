"""objective.py: quality losses from scores by hand, with and without a window metric, and scores that are refused."""

import math

import pytest
from helpers.two_layer_library import ALL, CONFIG, LIBRARY

from lit_puzzle.library.library import Candidate, Library
from lit_puzzle.scoring.scores import Measurement, Scores
from lit_puzzle.search.objective import TIE_BREAK, Objective
from lit_puzzle.spec import BlockSpec


def scores(**changes):
    """kl of the halves, long-context drop of the window; `changes` replace (layer, name) entries."""
    entries = {
        (0, "experts=2"): {"kl": 0.3},
        (1, "experts=2"): {"kl": 0.5},
        (1, "window=8"): {"kl": 0.25, "long": 0.1},
        **changes.pop("entries", {}),
    }
    made = {key: {name: Measurement(v, 0.0) for name, v in value.items()} for key, value in entries.items() if value}
    return Scores(changes.pop("parent", "parent"), 2, 10, made)


def test_scores_of_experts_and_window_are_added():
    assert Objective().quality_losses(LIBRARY, scores()) == [[0.0, 0.3], [0.0, 0.5, 0.25, 0.75]]


def test_a_pair_that_was_scored_has_its_own_score():
    pair = {(1, "experts=2,window=8"): {"kl": 0.6}}
    assert Objective().quality_losses(LIBRARY, scores(entries=pair))[1] == [0.0, 0.5, 0.25, 0.6]
    assert Objective("js").metric == "js"  # a pair without the metric falls back to the sum
    other = {(1, "experts=2,window=8"): {"js": 0.6}}
    assert Objective().quality_losses(LIBRARY, scores(entries=other))[1][3] == 0.75


def unjudged() -> Scores:
    """Scores whose data could not tell what the window of layer 1 costs."""
    found = scores()
    entries = {**found.entries, (1, "window=8"): {}}
    told = {(1, "window=8"): {"tokens": 0.0, "long": 0.0}, (1, "experts=2"): {"tokens": 0.4}}
    return Scores("parent", 2, 10, entries, told, 12)


def test_what_was_not_measured_is_refused_unless_told():
    for objective, what in ((Objective(), "scored tokens"), (Objective(window_metric="long"), "items of 'long'")):
        with pytest.raises(
            ValueError, match=rf"layer 1.*was not measured: none of the {what} could tell.*unmeasured: ex"
        ):
            objective.quality_losses(LIBRARY, unjudged())
    assert Objective(unmeasured="zero").quality_losses(LIBRARY, unjudged()) == [[0.0, 0.3], [0.0, 0.5, 0.0, 0.5]]
    kept = Objective(unmeasured="exclude").measured(LIBRARY, unjudged())
    assert [[c.name for c in row] for row in kept] == [["parent", "experts=2"], ["parent", "experts=2"]]
    assert Objective().measured(LIBRARY, unjudged()) == LIBRARY.layers
    with pytest.raises(ValueError, match="unmeasured must be one of"):
        Objective(unmeasured="guess")  # type: ignore[arg-type]
    assert Scores.from_json(unjudged().to_json()) == unjudged()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0.0, 0.0), "every quality loss in lm_loss is 0: all plans .* equally good, and none the best"),
        ((-0.1, -0.2, -0.3), "every quality loss in lm_loss is below 0"),
    ],
)
def test_scores_that_order_nothing_or_are_gains_are_refused(values, message):
    keys = [(0, "experts=2"), (1, "experts=2"), (1, "window=8")]
    entries = {key: {"lm_loss": value} for key, value in zip(keys, values, strict=True)}
    with pytest.raises(ValueError, match=message):
        Objective("lm_loss").quality_losses(LIBRARY, scores(entries=entries))


def test_an_accuracy_in_place_of_its_drop_is_refused():
    rows: list[tuple[Candidate, ...]] = []
    entries: dict[tuple[int, str], dict[str, Measurement]] = {}
    for layer in range(2):
        own = LIBRARY.layers[layer][0]
        made = [BlockSpec(tuple(range(count)), own.block.window_tokens) for count in (3, 2)]
        rows.append((own, *(Candidate(f"experts={block.num_experts}", block) for block in made)))
        entries |= {(layer, f"experts={count}"): {"accuracy": Measurement(0.1 * count)} for count in (3, 2)}
    library = Library("parent", 4, CONFIG, tuple(rows))
    with pytest.raises(ValueError, match="in all 2 layers the quality loss in accuracy falls with fewer experts"):
        Objective("accuracy").quality_losses(library, Scores("parent", 2, 10, entries))
    drops = {key: {"accuracy": Measurement(1 - m["accuracy"].mean)} for key, m in entries.items()}
    assert Objective("accuracy").quality_losses(library, Scores("parent", 2, 10, drops))[0] == [0.0, 0.7, 0.8]


def test_normalized_scores_by_hand():
    # S_experts = 0.3 + 0.5 = 0.8, S_w = 0.1, S_m = 0.25.
    quality_losses = Objective(window_metric="long", balance=0.25).quality_losses(LIBRARY, scores())
    window = 0.25 * (1 + TIE_BREAK)
    assert quality_losses[0] == pytest.approx([0.0, 0.75 * 0.3 / 0.8])
    assert quality_losses[1] == pytest.approx([0.0, 0.75 * 0.5 / 0.8, window, 0.75 * 0.5 / 0.8 + window])
    maxima = sum(max(row) for row in quality_losses)
    assert maxima == pytest.approx(1.0 + 0.25 * TIE_BREAK)  # per-layer maxima of each kind sum to its weight


def windows_of_layer_1(**drops):
    """Return the quality losses of windows 8, 4 and 2 of layer 1, from `long` and, where two are given, `kl`."""
    row = (LIBRARY.layers[1][0], *(Candidate(f"window={w}", BlockSpec(ALL, w)) for w in (4, 8, 2)))
    entries = {
        (1, f"window={name[1:]}"): dict(zip(("long", "kl"), values, strict=False)) for name, values in drops.items()
    }
    library = Library("parent", 4, CONFIG, (LIBRARY.layers[0], row))
    found = Objective(window_metric="long", balance=1.0).quality_losses(library, scores(entries=entries))[1]
    return {"w4": found[1], "w8": found[2], "w2": found[3]}


def test_an_accuracy_that_rises_is_no_gain_and_ties_are_broken_by_the_metric():
    quality_losses = windows_of_layer_1(w8=(-0.2, 0.1), w4=(-0.1, 0.3), w2=(0.4, 0.6))
    assert quality_losses == pytest.approx(
        {"w8": TIE_BREAK * 0.1 / 0.6, "w4": TIE_BREAK * 0.3 / 0.6, "w2": 1 + TIE_BREAK}
    )


def test_a_narrower_window_never_has_the_lower_loss():
    quality_losses = windows_of_layer_1(w8=(0.2,), w4=(0.05,), w2=(0.4,))
    assert quality_losses == pytest.approx({"w8": 0.5, "w4": 0.5, "w2": 1.0})


def test_a_library_without_windows():
    only_experts = Library("parent", 4, CONFIG, tuple(row[:2] for row in LIBRARY.layers))
    quality_losses = Objective(window_metric="long").quality_losses(only_experts, scores())
    assert quality_losses == [[0.0, pytest.approx(0.5 * 0.3 / 0.8)], [0.0, pytest.approx(0.5 * 0.5 / 0.8)]]


@pytest.mark.parametrize(
    ("entries", "objective", "message"),
    [
        ({(1, "window=8"): None}, Objective(), r"layer 1, candidate 'window=8': the scores have no entry 'window=8'"),
        (
            {(0, "experts=2"): {"kl": math.nan}},
            Objective(),
            r"layer 0, candidate 'experts=2': .* 'kl' .* is nan",
        ),
        ({(1, "experts=2"): {"kl": math.inf}}, Objective(), r"layer 1, candidate 'experts=2': .* is inf"),
        ({}, Objective("hidden_mse"), r"no metric 'hidden_mse' of 'experts=2'; they have \['kl'\]"),
        ({(1, "window=8"): {"kl": 1.0}}, Objective(window_metric="long"), r"layer 1, .* no metric 'long'"),
    ],
)
def test_scores_that_cannot_be_used_are_named(entries, objective, message):
    with pytest.raises(ValueError, match=message):
        objective.quality_losses(LIBRARY, scores(entries=entries))


def test_scores_of_another_parent_are_refused():
    with pytest.raises(ValueError, match="parent"):
        Objective().quality_losses(LIBRARY, scores(parent="another"))


@pytest.mark.parametrize("balance", [-0.1, 1.1, math.nan])
def test_balance_is_a_weight(balance):
    with pytest.raises(ValueError, match="balance"):
        Objective(balance=balance)


def two_sets() -> Library:
    """Layer 1 with a second set of two experts, alone and windowed."""
    second = (
        Candidate("experts=2@reap", BlockSpec((2, 3), None)),
        Candidate("experts=2@reap,window=8", BlockSpec((2, 3), 8)),
    )
    return Library("parent", 4, CONFIG, (LIBRARY.layers[0], (*LIBRARY.layers[1], *second)))


@pytest.mark.parametrize(("other", "kept"), [(0.4, "experts=2@reap"), (0.6, "experts=2"), (0.5, "experts=2")])
def test_of_several_sets_of_one_size_that_of_the_lower_score_is_searched(other, kept):
    found = scores(entries={(1, "experts=2@reap"): {"kl": other}})
    best = Objective().best_sets(two_sets(), found)
    assert [candidate.name for candidate in best.layers[1]][1:] in (
        [kept, "window=8", f"{kept},window=8"],
        ["window=8", kept, f"{kept},window=8"],
    )
    losses = Objective().quality_losses(two_sets(), found)[1]
    least = dict(zip([c.name for c in two_sets().layers[1]], losses, strict=True))
    assert least[f"{kept},window=8"] == min(least["experts=2,window=8"], least["experts=2@reap,window=8"])


def test_sets_without_a_score_are_left_in_and_refused_later():
    assert Objective().best_sets(two_sets(), scores()) == two_sets()
    assert Objective().best_sets(LIBRARY, scores()) == LIBRARY
