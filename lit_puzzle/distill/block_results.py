"""What blockwise distillation reports of its losses, and how it stops when one is not finite.

Writes `broken_batch_<rank>.pt` into the run folder of a run that stops; reads nothing.
Results: `loss/mean/first|last` and, per block, `loss/<layer>/<name>/first|last`: over the first and last tenth of the
batches; `val_loss/mean/first|last`.

Shapes: C blocks, N updates, V validations.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.distill.block_selection import SelectedBlock


def named(split: str, blocks: Sequence[SelectedBlock], losses_C: Tensor) -> dict[str, float]:
    """Return the losses of blocks by their names in logs and results."""
    return {f"{split}/{block.title}": loss for block, loss in zip(blocks, losses_C.tolist(), strict=True)}


def loss_results(blocks: Sequence[SelectedBlock], losses_NC: Tensor, validated: Sequence[Tensor]) -> dict[str, float]:
    """Return the headline numbers of a run.

    Args:
        blocks: the blocks that trained.
        losses_NC: their losses at every update.
        validated: (C) losses of each validation.
    """
    results: dict[str, float] = {}
    tenth = max(1, len(losses_NC) // 10)
    for when, part_C in (("first", losses_NC[:tenth].mean(0)), ("last", losses_NC[-tenth:].mean(0))):
        results[f"loss/mean/{when}"] = float(part_C.mean())
        results |= {f"{name}/{when}": value for name, value in named("loss", blocks, part_C).items()}
    if validated:
        ends = {"first": validated[0], "last": validated[-1]}
        results |= {f"val_loss/mean/{when}": float(losses_C.mean()) for when, losses_C in ends.items()}
    return results


def check_losses(
    blocks: Sequence[SelectedBlock], losses_C: Tensor, batch: PackedBatch, step: int, folder: Path, rank: int
) -> None:
    """Stop the run if a loss is not finite; losses are summed over processes, so that all stop together.

    Args:
        blocks: the blocks.
        losses_C: their losses.
        batch: what they were computed on, which is kept in a file.
        step: number of updates before.
        folder: where the file is written.
        rank: of this process.

    Raises:
        ValueError: one is not finite; names the block.
    """
    broken = [block for block, loss in zip(blocks, losses_C.tolist(), strict=True) if not math.isfinite(loss)]
    if not broken:
        return
    file = folder / f"broken_batch_{rank}.pt"
    content = {"batch": {name: tensor.cpu() for name, tensor in batch.items()}, "step": step}
    torch.save(content | {"losses": losses_C}, file)
    names = [f"{block.name!r} of layer {block.layer}" for block in broken]
    raise ValueError(
        f"The loss of {', '.join(names[:4])}{' and others' if len(names) > 4 else ''} is not finite at step {step}; "
        f"the batch is in {file}. Lower the learning rate, set clip_norm, or look for broken weights in the parent or "
        "the library."
    )
