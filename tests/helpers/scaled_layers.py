"""The KV scales of layers that have some, for tests that know which do."""

from collections.abc import Sequence

from lit_puzzle.kv_cache.scales import LayerScales


def scaled(layer: LayerScales | None) -> LayerScales:
    """Return the scales of a layer, whose cache must not be in bf16."""
    assert layer is not None, "this layer's cache stays in bf16"
    return layer


def all_scaled(layers: Sequence[LayerScales | None]) -> list[LayerScales]:
    """Return the scales of all layers, none of which may be in bf16."""
    return [scaled(layer) for layer in layers]
