"""Compare the results of vLLM's engines with transformers; each function returns one check of the report.

In float32 the largest difference of log-probabilities counts, in bfloat16 the mean one, because rounding alone soon
changes greedy tokens. Negative controls are wrong on purpose: they pass if the comparison notices the difference.

Reads and writes nothing. `results` are those of `lit_puzzle.serve.vllm.driver`, by the names of the engines in
`lit_puzzle.serve.vllm.check.plan_engines`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_puzzle.serve.vllm.check_reference import Reference
from lit_puzzle.serve.vllm.report import Check, checked, difference, skipped

Results = Mapping[str, Sequence[Any]]  # engine -> one result for each step
RELOAD_TOLERANCE = 1e-6  # of log-probabilities of the same engine
NOTICED_SCALES = 1e-3  # least change of a log-probability when KV scales are dropped


def compare(reference: Reference, results: Results, exact: bool, tolerance: float) -> list[Check]:
    """Return the checks of the engines' results.

    Args:
        reference: completions and log-probabilities of transformers.
        results: results of the engines.
        exact: whether the largest difference counts (float32) or the mean one.
        tolerance: allowed difference of log-probabilities.
    """
    found, permuted, again = results["main"][1], results["main"][3], results["main"][5]
    forced = results["main"][6:-1]
    error = difference(found, reference.logprobs)[not exact]
    reason = f"differ by {error:.2g} (allowed {tolerance:g})"
    checks = [
        compare_greedy(reference.completions, results["main"][0], exact),
        checked("log_probabilities", error <= tolerance, reason, {"difference": error}),
        compare_reload(found, again),
        compare_stops(reference, forced),
        compare_capacity(results["bfloat16"][0]["tokens"], results["fp8"][0]["tokens"]),
    ]
    noticed = max(tolerance, 2 * error)
    controls = {"control_experts": permuted, "control_window": results["window"][0] if "window" in results else None}
    for name, logprobs in controls.items():
        if logprobs is None:
            checks.append(skipped(name, "no window of a child is narrower than the prompts"))
            continue
        wrong = difference(logprobs, reference.logprobs)[not exact]
        reason = f"log-probabilities differ by {wrong:.2g}, noticed above {noticed:.2g}"
        checks.append(checked(name, wrong > noticed, reason, {"difference": wrong}))
    return [*checks, compare_scales(results["fp8"], reference)]


def compare_greedy(expected: Sequence[list[int]], found: Sequence[list[int]], exact: bool) -> Check:
    """Compare greedy tokens one by one."""
    pairs = [pair for row, other in zip(expected, found, strict=True) for pair in zip(row, other, strict=True)]
    equal = sum(a == b for a, b in pairs)
    reason = f"{equal} of {len(pairs)} equal those of transformers"
    if not exact:
        return skipped("greedy_tokens", f"{reason}; they depend on rounding in bfloat16")
    return checked("greedy_tokens", equal == len(pairs), reason, {"equal": equal, "tokens": len(pairs)})


def compare_reload(fresh: Sequence[list[float]], again: Sequence[list[float]]) -> Check:
    """Compare an engine after a reload of wrong and then right weights with the newly started engine."""
    largest, _ = difference(fresh, again)
    reason = f"log-probabilities differ by {largest:.2g} from those of the newly started engine"
    return checked("reload", largest <= RELOAD_TOLERANCE, reason, {"difference": largest})


def compare_stops(reference: Reference, forced: Sequence[Mapping[str, Any]]) -> Check:
    """Check that a completion ends at each end token of generation_config.json and at no other token."""
    wrong = [
        token
        for token, result in zip([*reference.end_ids, reference.plain_id], forced, strict=True)
        if (result["finish_reason"] == "stop") != (token in reference.end_ids)
        or len(result["ids"]) != (1 if token in reference.end_ids else 4)
    ]
    reason = f"stops at {reference.end_ids} and at no other token" if not wrong else f"wrong at tokens {wrong}"
    return checked("stop_tokens", not wrong, reason, {"stop_tokens": len(reference.end_ids)})


def compare_capacity(bfloat16: int, fp8: int) -> Check:
    """Check that an FP8 KV cache holds twice the tokens of a bfloat16 one in the same memory."""
    return checked("kv_tokens", fp8 == 2 * bfloat16, f"{fp8} in FP8, {bfloat16} in bfloat16", {"ratio": fp8 / bfloat16})


def compare_scales(fp8: Sequence[Any], reference: Reference) -> Check:
    """Check that the checkpoint's KV scales are used: log-probabilities change when they are dropped."""
    quality_loss = difference(fp8[1], reference.logprobs)[1]
    if len(fp8) == 2:
        reason = (
            f"the checkpoint has no KV scales except 1; FP8 changes log-probabilities by {quality_loss:.2g} on average"
        )
        return skipped("control_scales", reason)
    changed = difference(fp8[1], fp8[3])[0]
    without = difference(fp8[3], reference.logprobs)[1]
    reason = f"FP8 changes log-probabilities by {quality_loss:.2g} on average, without scales by {without:.2g}"
    metrics = {"quality_loss": quality_loss, "quality_loss_without": without}
    return checked("control_scales", changed > NOTICED_SCALES, reason, metrics)
