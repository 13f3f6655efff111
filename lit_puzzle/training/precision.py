"""What `trainer.precision` and a recipe's `dtype` mean for the bytes of numbers; torch-free, for footprints."""

from __future__ import annotations

from lit_puzzle.model.footprint import BYTES
from lit_puzzle.run.recipe_values import Values


def layer_precision(precision: object, dtype: object) -> str:
    """Return the key of `lit_puzzle.model.footprint.ACTIVATIONS` for a Trainer's precision and a dtype of weights."""
    if str(precision) == "bf16-mixed":
        return "bf16-mixed"
    return "bfloat16" if str(dtype) in ("bfloat16", "float16") else "float32"


def cache_width(precision: object, dtype: object) -> int:
    """Return the bytes of a number of a KV cache: that of the projections, which autocast computes in bfloat16."""
    return 4 if layer_precision(precision, dtype) == "float32" else 2


def optimizer_of(values: Values) -> str:
    """Return the class path of a recipe's optimizer."""
    found = values.get("model.init_args.optimizer")
    return str(found.get("class_path", "AdamW")) if isinstance(found, dict) else str(found or "AdamW")


def moe_chunk(model: Values) -> float | None:
    """Return the tokens that experts take at a time in training (`training.moe_chunk_tokens`); None: all."""
    found = model.get("training.moe_chunk_tokens")
    return None if found is None else float(found)


def width_of(dtype: object) -> int:
    """Return the bytes of a number of a dtype."""
    return BYTES[str(dtype)]
