"""Bench: the cost model against gpt-oss-120b and the released child of it as vLLM served them on one H200.

    python scripts/bench/served_plans.py

What was measured on the card (docs/gpu.md, vLLM on an H200) is below; the predictions are for the same architectures,
lengths, numbers of requests and FP8 KV cache, by the kernels measured on an H200 (extra `gpu-tables`) and by the
roofline. Nothing of an H200 was fitted. Ends with one JSON line.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu_check"))
from serving import configs

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.kv_layout import group_width, vllm_capacity, window_counts
from lit_puzzle.costs.measured_kernels import MeasuredKernels
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.costs.serving import Deployment, parent_blocks
from lit_puzzle.spec import Scenario

GENERATED = {  # requests of 1,024 prompt and 1,024 generated tokens -> generated tokens a second
    64: {"parent": 2258.3, "child": 2699.0},
    128: {"parent": 3544.6, "child": 4129.5},
}
READ: dict[tuple[int, int], dict[str, float]] = {  # requests, prompt tokens -> prompt tokens a second
    (16, 4096): {"parent": 46381, "child": 47337},
    (4, 32768): {"parent": 34644, "child": 37351},
}
BLOCKS, REQUESTS = {"parent": 238509, "child": 654006}, {"parent": 58.07377647918189, "child": 53.0762863171563}
LENGTH, IN_FLIGHT, BLOCK_TOKENS, TOKEN_BYTES = 32833, 32768, 16, 2 * 8 * 64  # keys and values of 8 heads of 64, FP8


def main() -> None:
    models, errors, ratios = configs(small=False), dict[str, list[float]](), dict[str, list[float]]()
    for times in (MeasuredKernels(), Roofline()):
        rows = [(f"{batch} requests of 1,024 + 1,024", batch, 1024, 1024, row) for batch, row in GENERATED.items()]
        rows += [(f"{batch} prompts of {prompt:,}", batch, prompt, 1, row) for (batch, prompt), row in READ.items()]
        for name, batch, prompt, generated, measured in rows:
            found = {}
            for model, config in models.items():
                costs = CostModel(ModelShape.from_config(config), Scenario("H200", 1, prompt, generated, batch), times)
                whole = costs.predict(parent_blocks(config), Deployment(1, 1, 1), batch)
                reading = batch * prompt / (whole.latency_seconds - generated * whole.step_seconds)
                found[model] = whole.tokens_per_second if generated > 1 else reading
                if generated > 1:
                    errors.setdefault(times.name, []).append(found[model] / measured[model] - 1)
            ratio = found["child"] / found["parent"], measured["child"] / measured["parent"]
            if generated > 1:
                ratios.setdefault(times.name, []).append(ratio[0] / ratio[1] - 1)
            cells = "  ".join(f"{model} {found[model]:,.0f} ({measured[model]:,.0f})" for model in found)
            print(f"{times.name:16s} {name:28s} {cells}  child / parent {ratio[0]:.3f} ({ratio[1]:.3f})")
    fits = {}
    for model, config in models.items():
        counts = window_counts(block.window_tokens for block in parent_blocks(config))
        held = BLOCKS[model] * group_width(counts) * BLOCK_TOKENS * TOKEN_BYTES
        fits[model] = vllm_capacity(counts, held, LENGTH, TOKEN_BYTES, BLOCK_TOKENS, IN_FLIGHT).requests
        print(
            f"requests of {LENGTH:,} tokens that fit {held / 2**30:.1f} GiB: {fits[model]:.4f} ({REQUESTS[model]:.4f})"
        )
    result = {
        "mean_absolute_error": {name: round(statistics.fmean(map(abs, values)), 4) for name, values in errors.items()},
        "speed_up_errors": {name: [round(value, 4) for value in values] for name, values in ratios.items()},
        "worst_capacity_error": max(abs(fits[model] / REQUESTS[model] - 1) for model in fits),
    }
    print(json.dumps({"name": "served_plans", **result}))


if __name__ == "__main__":
    main()
