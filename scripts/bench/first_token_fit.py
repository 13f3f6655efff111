"""Bench: fit the three constants of the time to the first token to one half of public measurements, test on the other.

    python scripts/bench/first_token_fit.py [--rows FILE.csv] [--fewest-ranks]

The rows are those of published_throughputs.py. Fitted, by the least mean absolute error of the time to the first token
on a grid: `FrontEnd.request_seconds` and `token_seconds`, and the FLOP/s of Marlin's experts on H100 and H200, which no
table measured. The half that is fitted is the first row and every second one after it; with --fewest-ranks, the rows of
each GPU's lowest tensor parallelism, so that the test is another parallelism. Throughputs and steps are not looked at.

Prints the errors of both halves under the best constants and under those in the code, and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from published_throughputs import MARLIN_FLOPS, Run, carried, predict, read_rows, summary

from lit_puzzle.costs.closed_loop import FrontEnd

REQUEST_SECONDS = (0.006, 0.008, 0.010, 0.012, 0.014)
TOKEN_SECONDS = (0.0, 1e-6, 2e-6, 3e-6, 4e-6)
FLOPS = (150e12, 170e12, 190e12, 210e12, 230e12, 250e12)
Constants = tuple[float, float, float | None]


def ratios(runs: list[Run], constants: Constants) -> list[float]:
    """Return predicted / measured times to the first token."""
    request, token, flops = constants
    front = FrontEnd(request, token)
    return [predict(run, front, flops)["first_token"] / run.first_token for run in runs if run.first_token is not None]


def main(path: Path | None, fewest_ranks: bool) -> None:
    runs = carried() if path is None else read_rows(path)
    fitted, tested = runs[::2], runs[1::2]
    if fewest_ranks:
        fewest = {gpu: min(run.ranks for run in runs if run.gpu == gpu) for gpu in {run.gpu for run in runs}}
        fitted, tested = ([run for run in runs if (run.ranks == fewest[run.gpu]) == few] for few in (True, False))
    grid = itertools.product(REQUEST_SECONDS, TOKEN_SECONDS, FLOPS)
    best: Constants = min(grid, key=lambda constants: summary(ratios(fitted, constants))["mean_absolute_error"])
    given: Constants = (FrontEnd().request_seconds, FrontEnd().token_seconds, MARLIN_FLOPS)
    nothing: Constants = (0.0, 0.0, None)
    result = {}
    for name, constants in (("best", best), ("in the code", given), ("nothing fitted", nothing)):
        errors = {half: summary(ratios(of, constants)) for half, of in (("fitted", fitted), ("tested", tested))}
        print(f"{name}: request, token seconds, FLOP/s {constants}: {errors}")
        result[name] = {"constants": constants} | errors
    print(json.dumps({"name": "first_token_fit", **result}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--fewest-ranks", action="store_true")
    given = parser.parse_args()
    try:
        main(given.rows, given.fewest_ranks)
    except ValueError as error:
        sys.exit(f"error: {error}")
