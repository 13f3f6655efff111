"""Print the tables of ablations, of all grids in a folder, as Markdown; `lit_puzzle.report.ablations` makes them.

    python scripts/ablations/table.py runs/ablations

The same tables stand in a report: lightning run recipes/report.yaml --folders='[runs/ablations]'
"""

import argparse
from pathlib import Path

from lit_puzzle.report.ablations import ablation_table, grids
from lit_puzzle.report.found_runs import find_runs
from lit_puzzle.report.page import Table


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    known = grids(find_runs([folder], own=folder / "report"))
    if not known:
        raise SystemExit(f"{folder} has no finished STAGE-VARIANT-SEED. Run recipes/ablations.yaml first.")
    for grid in known:
        try:
            print(markdown(ablation_table(grid)))
        except ValueError as error:
            print(f"No table: {error}")
        if grid.unfinished:
            print(f"Not finished: {', '.join(grid.unfinished)}.")


if __name__ == "__main__":
    main()
