"""edges.py: what is said of a plan that stands where little, or nothing, was measured."""

from helpers.two_layer_library import ALL, HALF, LIBRARY

from lit_puzzle.scoring.scores import Scores
from lit_puzzle.search.edges import edges
from lit_puzzle.spec import BlockSpec, Budget, Plan, Scenario, Target

TARGETS = [Target(Scenario("H100", 1, 1000, 500), Budget())]


def plan(*blocks: BlockSpec) -> dict[str, object]:
    return Plan("parent", 4, blocks).to_json()


def test_few_tokens_longer_contexts_and_the_least_experts_are_named() -> None:
    told = {(1, "window=8"): {"tokens": 0.02, "long": 0.9}, (1, "experts=2"): {"tokens": 0.5}}
    scores = Scores("parent", 2, 10, {}, told, 1000)
    found = edges(scores, LIBRARY, plan(BlockSpec(HALF, 8), BlockSpec(HALF, 8)), TARGETS)
    assert found == [
        "window=8 was chosen in layers [1], but only 2.0% of the scored tokens could tell its cost",
        "requests of 1500 tokens are planned for, but the longest sequence that was scored has 1000: what the plan "
        "loses beyond was not measured",
        "2 of 2 layers keep the fewest experts that the library offers: the best plan may have fewer, which were not"
        " scored",
    ]


def test_a_plan_within_what_was_measured_has_nothing_to_say() -> None:
    scores = Scores("parent", 2, 10, {}, {(1, "window=8"): {"tokens": 0.6}}, 2000)
    assert edges(scores, LIBRARY, plan(BlockSpec(ALL, 8), BlockSpec(ALL, 8)), TARGETS) == []
    assert edges(Scores("parent", 2, 10, {}), LIBRARY, plan(BlockSpec(ALL, 8), BlockSpec(ALL, None)), TARGETS) == []
