"""Distillation in bfloat16 on this device: the head at gpt-oss's vocabulary, then a step of the embedded tiny models.

The head: divergence and gradients over 201,088 tokens from 2,880 channels, logits of 1,024 targets at a time. The step:
child with float32 weights under bf16 autocast, parent in bfloat16, against both in float32.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from part import Options, Row, milliseconds, peak_mib, relative_error, run

from lit_puzzle.distill.losses import FullLogits, head_loss
from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.run.folder import PACKAGE


def head(options: Options) -> Iterator[Row]:
    """Yield time and memory of the head, in bfloat16 as it trains and in float32."""
    vocabulary, channels, targets = (500, 64, 100) if options.small else (201_088, 2880, 4096)
    settings = LossSettings(chunk_tokens=32 if options.small else 1024)
    states = [torch.randn(targets, channels, device=options.device) for _ in range(2)]
    matrix = torch.randn(vocabulary, channels, device=options.device).mul_(channels**-0.5)
    tokens = torch.randint(vocabulary, (targets,), device=options.device)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, parent, weight = (x.to(dtype) for x in (*states, matrix))
        hidden.requires_grad_()

        def both(hidden: Any, parent: Any, weight: Any) -> torch.Tensor:
            loss = head_loss(hidden, weight, FullLogits(parent, weight), tokens, settings).loss
            return torch.autograd.grad(loss, hidden)[0]

        call = partial(both, hidden, parent, weight)
        gradients.append(call())
        yield {"head in": str(dtype).removeprefix("torch."), "targets": targets, "vocabulary": vocabulary} | {
            "ms": milliseconds(call, options.device, 1),
            "peak_mib": peak_mib(call, options.device),
        }
    error = relative_error(gradients[1], gradients[0])
    yield {"error of the head's gradient": error, "ok": error < 0.03}


def tiny_step(options: Options, mixed: bool) -> tuple[float, list[torch.Tensor]]:
    """Return loss per target and the gradients of one batch of 256 tokens."""
    from lit_puzzle.distill.distillation_loss import distillation_loss
    from lit_puzzle.model.loading import load_model
    from lit_puzzle.training.load_child import load_child
    from lit_puzzle.training.settings import TrainingSettings

    assets = PACKAGE / "assets"
    parent_dtype: Any = "bfloat16" if mixed else "float32"
    parent = load_model(assets / "tiny_parent", parent_dtype, "sink_attention", device=options.device)
    child: Any = load_child(None, assets / "tiny_child", TrainingSettings()).to(options.device).train()
    ids = torch.randint(3, 100, (1, 256), generator=torch.Generator().manual_seed(0)).to(options.device)
    positions = torch.arange(256, device=options.device)[None]
    batch: Any = {"input_ids": ids, "position_ids": positions, "document_ids": 0 * ids, "loss_mask": positions > 0}
    with torch.autocast(options.device, torch.bfloat16, enabled=mixed):
        terms = distillation_loss(child, parent.requires_grad_(False), batch, LossSettings())
    (terms.loss / terms.targets).backward()
    trained = [x.grad.flatten() for x in child.parameters() if x.grad is not None]
    return float((terms.loss / terms.targets).detach()), trained


def work(options: Options) -> Iterator[Row]:
    """Measure the head, then the step, which needs Lightning."""
    yield from head(options)
    exact, rounded = tiny_step(options, mixed=False), tiny_step(options, mixed=True)
    error = relative_error(torch.cat(rounded[1]), torch.cat(exact[1]))
    close = abs(rounded[0] - exact[0]) < 0.05 * exact[0]
    yield {"step": "tiny models", "loss float32": exact[0], "loss bf16": rounded[0]} | {
        "gradient error": error,
        "ok": close and error < 0.3,
    }


if __name__ == "__main__":
    run(work)
