"""Tabulate the evaluations of an ablation: a row for each variant, means over seeds and their standard errors.

    python scripts/ablations/table.py runs/ablations

Reads the run folders evaluate-VARIANT-SEED of a pipeline such as `recipes/ablations.yaml`. Unfinished ones are named;
a variant with one seed has no standard error. ± is the standard error of the mean over seeds: it holds what a seed
changes, not which problems were asked, for all variants the same.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.run.folder import is_complete

HEAD = "| variant | seeds | low | medium | high | mean | each seed | tokens |\n|---|---|---|---|---|---|---|---|"


def evaluations(folder: Path) -> tuple[dict[str, list[dict[str, float]]], list[str]]:
    """Return variant -> results of its seeds, and the evaluations that are not finished.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, list[dict[str, float]]] = {}
    unfinished = []
    places = [place for place in folder.glob("evaluate-*-*") if place.is_dir()]
    for place in sorted(places, key=lambda place: place.stat().st_ctime_ns):
        variant = place.name.removeprefix("evaluate-").rpartition("-")[0]
        if is_complete(place):
            found.setdefault(variant, []).append(json.loads((place / "run.json").read_text())["results"])
        else:
            unfinished.append(place.name)
    if not found:
        raise ValueError(f"{folder} has no finished evaluate-VARIANT-SEED. Run recipes/ablations.yaml first.")
    return found, unfinished


def shown(values: Sequence[float], form: str) -> str:
    """Return the mean, ± its standard error where there are several values."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{error}"


def row(variant: str, seeds: Sequence[Mapping[str, float]]) -> str:
    """Return one line of the table."""
    cells = [shown([seed[f"accuracy/{effort}"] for seed in seeds], ".3f") for effort in EFFORTS]
    tokens = " / ".join(f"{statistics.mean(seed[f'tokens/{effort}'] for seed in seeds):.1f}" for effort in EFFORTS)
    means = [statistics.mean(seed[f"accuracy/{effort}"] for effort in EFFORTS) for seed in seeds]
    each = ", ".join(f"{mean:.3f}" for mean in means)
    return f"| {variant} | {len(seeds)} | {' | '.join(cells)} | {shown(means, '.3f')} | {each} | {tokens} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    found, unfinished = evaluations(parser.parse_args().folder)
    print("\n".join([HEAD, *(row(variant, seeds) for variant, seeds in found.items())]))
    if unfinished:
        print(f"Not finished: {', '.join(unfinished)}.")


if __name__ == "__main__":
    main()
