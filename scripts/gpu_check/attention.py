"""Attention with sinks on this device: time, memory and error of every way to compute it, 4K to 64K tokens.

64 query and 8 key/value heads of 64 in bfloat16, full attention and a window of 128, one row; the error is that of
8 of the query heads against float32 (`BLOCKS`), relative to its norm. `ours` is what `sink_attention` chooses;
`FA3` and `FA4` the same under PyTorch's own switch to these libraries, where they are installed; `flex` is compiled
flex attention with a block mask; `hub` the kernel with sinks of the package `kernels`, forward only; `eager`
transformers' own, which is quadratic. Then packed and padded rows, against float64, and decoding.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from part import Options, Row, milliseconds, peak_mib, relative_error, run
from torch import Tensor
from transformers.masking_utils import eager_mask, sliding_window_causal_mask_function
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lit_puzzle.model.attention_kernels import BLOCKS, FLASH_CPU, FLASH_VARLEN, Span, choose_kernel
from lit_puzzle.model.cached_attention import attend_cached
from lit_puzzle.model.sink_attention import sink_attention, sink_attention_mask
from lit_puzzle.model.sink_folding import attend

SCALE = 0.125
TOLERANCE = 0.02  # bfloat16 rounds by 0.4%, twice in the output and more often in gradients
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v, sinks -> (B, T, H, C)


def ours(window: int | None) -> Attention:
    module: Any = SimpleNamespace(sliding_window=window)
    return lambda q, k, v, sinks: sink_attention(module, q, k, v, None, SCALE, s_aux=sinks)[0]


def eager(window: int | None) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        see = sliding_window_causal_mask_function(window or q.shape[2])
        mask = eager_mask(1, q.shape[2], q.shape[2], mask_function=see, dtype=q.dtype, device=q.device)
        module: Any = SimpleNamespace(sinks=sinks, num_key_value_groups=8, training=False)
        return eager_attention_forward(module, q, k, v, mask, SCALE)[0]

    return attention


def flex(window: int | None) -> Attention:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention)

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        seen = window or q.shape[2]
        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j < seen), None, None, q.shape[2], q.shape[2], q.device
        )
        out, aux = compiled(q, k, v, block_mask=mask, scale=SCALE, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return (out * (aux.lse - sinks.float()[:, None]).sigmoid()[..., None].to(out.dtype)).transpose(1, 2)

    return attention


def hub(window: int | None) -> Attention:
    from kernels import get_kernel

    kernel = get_kernel("kernels-community/vllm-flash-attn3")
    seen = (-1, -1) if window is None else (window - 1, 0)

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        tensors = (x.transpose(1, 2) for x in (q, k, v))
        out = kernel.flash_attn_func(*tensors, softmax_scale=SCALE, causal=True, window_size=seen, s_aux=sinks)
        return out[0] if isinstance(out, tuple) else out

    return attention


def implementation(name: str, window: int | None) -> Attention:
    """Return `ours` after PyTorch's switch to another flash library."""
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl(name)
    return ours(window)


def inputs(tokens: int, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(tokens)
    shapes = (1, 64, tokens, 64), (1, 8, tokens, 64), (1, 8, tokens, 64), (64,)
    return [torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_() for s in shapes]


def reference(tensors: list[Tensor], weight: Tensor, window: int | None) -> list[Tensor]:
    """Return output and gradients of the first key/value head's 8 query heads in float32."""
    parts = [tensors[0][:, :8], tensors[1][:, :1], tensors[2][:, :1], tensors[3][:8]]
    q, k, v, sinks = (x.detach().float().requires_grad_() for x in parts)
    out = attend(q, k, v, sinks, BLOCKS, Span(SCALE, window)).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad((out * weight[:, :, :8]).sum(), [q, k, v, sinks])]


def measure(name: str, make: Callable[[int | None], Attention], tokens: int, window: int | None, device: str) -> Row:
    """Time one way at one size; forward and backward, and the errors of both."""
    tensors = inputs(tokens, device)
    weight = torch.randn(1, tokens, 64, 64, device=device, dtype=torch.bfloat16)
    row: Row = {"path": name, "tokens": tokens, "window": window, "forward_ms": None, "backward_ms": None}
    row |= {"peak_mib": None, "out": None, "dq": None, "dk": None, "dv": None, "dsink": None, "note": ""}
    try:
        attention = make(window)
        with torch.no_grad():
            row["forward_ms"] = milliseconds(partial(attention, *tensors), device)
            out = attention(*tensors)
        expected = reference(tensors, weight, window)
        row["out"] = relative_error(out[:, :, :8], expected[0])
        if name != "hub":

            def both() -> tuple[Tensor, ...]:
                return torch.autograd.grad((attention(*tensors) * weight).sum(), tensors)

            row["backward_ms"] = round(milliseconds(both, device) - row["forward_ms"], 3)
            row["peak_mib"] = peak_mib(both, device)
            heads = (8, 1, 1)
            found = both()
            parts = [*(x[:, :n] for x, n in zip(found[:3], heads, strict=True)), found[3][:8]]
            names = ("dq", "dk", "dv", "dsink")
            row |= {n: relative_error(x, e) for n, x, e in zip(names, parts, expected[1:], strict=True)}
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # of a library that is not ours to fix
        if name == "ours":
            raise
        row["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        return row
    errors = [row[key] for key in ("out", "dq", "dk", "dv", "dsink") if row[key] is not None]
    return row | {"ok": name != "ours" or max(errors) < TOLERANCE}


def ragged(device: str) -> Row:
    """Compare padded rows of packed documents with the same in float64 on the CPU."""
    tokens = 1000
    real = torch.ones(3, tokens, dtype=torch.bool)
    real[0, :317], real[2, 990:] = False, False
    ids = torch.zeros(3, tokens, dtype=torch.long)
    ids[1, 400:], ids[2, 3:] = 1, 1
    shapes = (3, 64, tokens, 64), (3, 8, tokens, 64), (3, 8, tokens, 64), (64,)
    exact = [torch.randn(s, dtype=torch.float64).bfloat16().double() for s in shapes]
    plain = sliding_window_causal_mask_function(129)
    found = []
    for place, dtype in (("cpu", torch.float64), (device, torch.bfloat16)):
        at = ids.to(place)

        def see(b: Any, h: Any, i: Any, j: Any, at: Tensor = at) -> Any:
            return plain(b, h, i, j) & (at[b, i] == at[b, j])

        mask = sink_attention_mask(3, tokens, tokens, see, real.to(place), place)
        q, k, v, sinks = (x.to(place, dtype).requires_grad_() for x in exact)
        module: Any = SimpleNamespace(sliding_window=129)
        out, _ = sink_attention(module, q, k, v, mask, SCALE, s_aux=sinks)
        found.append([x.cpu() for x in (out, *torch.autograd.grad(out.square().sum(), (q, k, v, sinks)))])
    errors = [relative_error(value, expected) for expected, value in zip(*found, strict=True)]
    names = ("out", "dq", "dk", "dv", "dsink")
    return {"packed and padded": "ours", **dict(zip(names, errors, strict=True)), "ok": max(errors) < TOLERANCE}


@torch.no_grad()
def decoding(cached: int, rows: int, device: str) -> list[Row]:
    """Return the times of one new token behind cached ones, grouped and eager."""
    shapes = (rows, 64, 1, 64), (rows, 8, cached, 64), (rows, 8, cached, 64), (64,), (rows, 1, 1, cached)
    q, k, v, sinks, mask = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)
    mask.zero_()
    module: Any = SimpleNamespace(sinks=sinks, num_key_value_groups=8, training=False)
    ways: dict[str, Callable[[], Tensor]] = {
        "grouped": lambda: attend_cached(q, k, v, mask, sinks, SCALE),
        "eager": lambda: eager_attention_forward(module, q, k, v, mask, SCALE)[0],
    }
    exact = attend_cached(q.float(), k.float(), v.float(), mask.float(), sinks.float(), SCALE)
    return [
        {"decoding": name, "rows": rows, "cached": cached, "ms": milliseconds(way, device)}
        | {"peak_mib": peak_mib(way, device), "error": relative_error(way(), exact)}
        for name, way in ways.items()
    ]


def work(options: Options) -> Iterator[Row]:
    """Measure every way at every size."""
    device = options.device
    chosen = choose_kernel(torch.device(device), torch.bfloat16, 64)
    names = {id(BLOCKS): "blocks", id(FLASH_CPU): "flash_cpu", id(FLASH_VARLEN): "flash_varlen"}
    yield {"chosen kernel": names[id(chosen)]}
    yield ragged(device)
    sizes = [128, 300] if options.small else [4096, 16384, 65536]
    yield from decoding(sizes[-2], 2 if options.small else 16, device)
    ways: dict[str, Callable[[int | None], Attention]] = {"ours": ours, "eager": eager}
    if device == "cuda":
        ways |= {"hub": hub, **{name: partial(implementation, name) for name in ("FA3", "FA4")}}  # the switch stays
        ways["flex"] = flex  # last, because it compiles
    for name, make in ways.items():
        for tokens in sizes:
            for window in (None, 128):
                if name != "eager" or tokens <= 4096:
                    yield measure(name, make, tokens, window, device)


if __name__ == "__main__":
    run(work)
