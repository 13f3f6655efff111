"""Compare the results of vLLM's engines with transformers; each function returns one check of the report.

In float32 the largest difference of log-probabilities to transformers counts, allowed as much as `LARGEST_ROUNDINGS`
times the largest that rounding changes in transformers itself (or a given tolerance), but at least `EXACT_TOLERANCE`.
In bfloat16 rounding alone soon changes
greedy tokens, and the mean difference counts: to transformers in float32, allowed as much as `ROUNDINGS` times what
rounding changes in transformers itself (or a given tolerance, then to transformers in bfloat16). Negative controls are
wrong on purpose: they pass if the comparison notices the difference. A control that transformers does not notice either
cannot show, and one that changes the engine's results by less than rounding does is hidden: both are skipped.

Reads and writes nothing. `results` are those of `lit_puzzle.serve.vllm.driver`, by the names of the engines in
`lit_puzzle.serve.vllm.check.plan_engines`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_puzzle.costs.kv_layout import VERSIONS, padding_share, vllm_capacity, window_counts
from lit_puzzle.serve.vllm.check_reference import Reference
from lit_puzzle.serve.vllm.report import Check, checked, difference, skipped

Results = Mapping[str, Sequence[Any]]  # engine -> one result for each step
EXACT_TOLERANCE = 2e-5  # of the largest difference in float32; 16 roundings (2^-24) of a log-probability of 20
ROUNDINGS = 2.0  # an engine may round this many times as much as transformers does, on average
LARGEST_ROUNDINGS = 4.0  # the same for the largest of all differences
RELOAD_TOLERANCE = 1e-6  # of log-probabilities of the same engine
ALLOCATION_TOLERANCE = 0.02  # of the blocks of the KV cache, and of the requests that fit it
BY_RELOAD = ("reload", "control_experts")  # checks that a reload makes
KEPT = "vLLM's own model keeps its experts when an engine is reloaded: permuted ones changed no log-probability"
NOTICED_SCALES = 1e-3  # least change of a log-probability when KV scales are dropped


def compare(
    reference: Reference, results: Results, exact: bool, tolerance: float | None, is_child: bool = True
) -> list[Check]:
    """Return the checks of the engines' results.

    Args:
        reference: completions and log-probabilities of transformers.
        results: results of the engines.
        exact: whether the largest difference counts (float32) or the mean one.
        tolerance: allowed difference of log-probabilities; None: what follows from the rounding of transformers.
        is_child: whether the engine's model is the plugin's; else vLLM's own, whose experts may outlast a reload.
    """
    found, again = results["main"][1], results["main"][5]
    forced = results["main"][6:-1]
    right = reference.logprobs if reference.exact_logprobs is None else reference.exact_logprobs
    allowed, metrics = allowed_difference(reference, exact, tolerance)
    error = difference(found, right)[not exact]
    reason = f"differ by {error:.2g} (allowed {allowed:.2g})"
    checks = [
        compare_greedy(reference.completions, results["main"][0], exact),
        checked("log_probabilities", error <= allowed, reason, {"difference": error} | metrics),
        compare_reload(found, again),
        compare_stops(reference, forced),
        compare_capacity(results["bfloat16"][0], results["fp8"][0]),
        compare_experts(reference, results["main"], max(allowed, 2 * error), exact),
        skipped("control_window", "no window of a child is narrower than the prompts"),
    ]
    if "window" in results:
        checks[-1] = compare_control(
            "control_window", results["window"][0], found, right, max(allowed, 2 * error), exact
        )
    if not is_child and results["main"][3] == found:
        checks = [skipped(check.name, KEPT) if check.name in BY_RELOAD else check for check in checks]
    return [*checks, compare_scales(results["fp8"], right)]


def allowed_difference(reference: Reference, exact: bool, tolerance: float | None) -> tuple[float, dict[str, float]]:
    """Return the allowed difference of log-probabilities, and the rounding it follows from.

    Raises:
        ValueError: rounding was not measured and no tolerance is given.
    """
    if tolerance is not None:
        return tolerance, {}
    if exact and reference.rounding is not None:
        return max(LARGEST_ROUNDINGS * reference.rounding, EXACT_TOLERANCE), {"rounding": reference.rounding}
    if reference.exact_logprobs is None:
        raise ValueError("tolerance is null, but the rounding that it follows from was not measured.")
    rounding = difference(reference.logprobs, reference.exact_logprobs)[1]
    return max(ROUNDINGS * rounding, EXACT_TOLERANCE), {"rounding": rounding}


def compare_experts(reference: Reference, main: Sequence[Any], noticed: float, exact: bool) -> Check:
    """Check that permuted experts are noticed, if they change anything in transformers."""
    possible = reference.permuted_change[not exact]
    if possible <= 2 * noticed:
        change = f"permuted experts change the log-probabilities of transformers itself by {possible:.2g} only"
        return skipped("control_experts", f"{change}, noticed is {noticed:.2g}")
    right = reference.logprobs if reference.exact_logprobs is None else reference.exact_logprobs
    return compare_control("control_experts", main[3], main[1], right, noticed, exact)


def compare_control(
    name: str, wrong: Sequence[Any], found: Sequence[Any], right: Sequence[Any], noticed: float, exact: bool
) -> Check:
    """Check that a negative control is noticed.

    Args:
        name: name of the check.
        wrong: log-probabilities of the control.
        found: those of the same engine without it.
        right: those of transformers.
        noticed: difference to transformers above which the comparison notices an error.
        exact: whether the largest difference counts or the mean one.
    """
    error, own = difference(wrong, right)[not exact], difference(wrong, found)[not exact]
    reason = f"log-probabilities differ by {error:.2g}, noticed above {noticed:.2g}"
    if not exact and error <= noticed and own > RELOAD_TOLERANCE:
        return skipped(name, f"{reason}: rounding hides it (of the engine's own, {own:.2g} changes); check in float32")
    return checked(name, error > noticed, reason, {"difference": error})


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


def compare_capacity(bfloat16: Mapping[str, Any], fp8: Mapping[str, Any]) -> Check:
    """Check that an FP8 KV cache holds twice the tokens of a bfloat16 one in the same memory, up to one block."""
    half, found, block = bfloat16["tokens"], fp8["tokens"], max(bfloat16["block"], fp8["block"])
    reason = f"{found} in FP8, {half} in bfloat16, in blocks of {block}"
    return checked("kv_tokens", abs(found - 2 * half) <= block, reason, {"ratio": found / half})


def compare_allocation(
    capacity: Mapping[str, Any], windows: Sequence[int | None], token_bytes: int, cache_bytes: int
) -> Check:
    """Check that the KV cache holds the requests that the cost model predicts, to within 2%.

    Args:
        capacity: what the engine states.
        windows: window of every layer.
        token_bytes: bytes of one token's keys and values in one layer.
        cache_bytes: memory of the KV cache.
    """
    version = ".".join(str(capacity["version"]).split(".")[:2])
    if version not in VERSIONS:
        return skipped("kv_allocation", f"the KV cache of vLLM {capacity['version']} is not modeled, {VERSIONS} are")
    block, in_flight = capacity["block"], capacity["in_flight"]
    counts = window_counts(windows)
    guess = vllm_capacity(counts, cache_bytes, capacity["length"], token_bytes, block, in_flight)
    errors = [guess.blocks / capacity["blocks"] - 1, guess.requests / capacity["requests"] - 1]
    reason = (
        f"{capacity['requests']:.2f} requests of {capacity['length']} tokens in {capacity['blocks']} blocks, predicted "
        f"{guess.requests:.2f} in {guess.blocks}; {padding_share(counts):.0%} of the cache is padding"
    )
    metrics = {"requests": capacity["requests"], "predicted": guess.requests, "padding": padding_share(counts)}
    return checked("kv_allocation", max(map(abs, errors)) <= ALLOCATION_TOLERANCE, reason, metrics)


def compare_scales(fp8: Sequence[Any], right: Sequence[Sequence[float]]) -> Check:
    """Check that the checkpoint's KV scales are used: log-probabilities change when they are dropped."""
    quality_loss = difference(fp8[1], right)[1]
    if len(fp8) == 2:
        reason = (
            f"the checkpoint has no KV scales except 1; FP8 changes log-probabilities by {quality_loss:.2g} on average"
        )
        return skipped("control_scales", reason)
    changed = difference(fp8[1], fp8[3])[0]
    without = difference(fp8[3], right)[1]
    reason = f"FP8 changes log-probabilities by {quality_loss:.2g} on average, without scales by {without:.2g}"
    metrics = {"quality_loss": quality_loss, "quality_loss_without": without}
    return checked("control_scales", changed > NOTICED_SCALES, reason, metrics)
