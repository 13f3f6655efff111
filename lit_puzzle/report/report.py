"""The report of a whole child: one HTML page and its pictures, from the run folders of all stages.

Reads records, plans, scores, metrics, evaluations and throughputs of complete runs. Writes `report.html`, one page that
needs no network, and `pictures/*.png`. What has not been run is said in its place, with the command that makes it;
every number names its run. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from lit_puzzle.report.ablations import TITLE, ablations_section
from lit_puzzle.report.found_runs import DAMAGED, FoundRuns, find_runs
from lit_puzzle.report.model_sections import importance_section, kv_section, plan_section, scores_section
from lit_puzzle.report.page import Report, Section, page
from lit_puzzle.report.request_sections import frontier_section, samples_section, speed_section
from lit_puzzle.report.training_sections import curves_section, results_section
from lit_puzzle.run.files import write_atomically
from lit_puzzle.run.folder import RECORD
from lit_puzzle.run.identity import file_identity
from lit_puzzle.run.inputs import claim_inputs, record_output, run_date

REPORT_FILE, PICTURES = "report.html", "pictures"

SECTIONS: tuple[tuple[str, Callable[[FoundRuns], Section]], ...] = (
    ("Requests", frontier_section),
    ("Plan", plan_section),
    ("Expert importance", importance_section),
    ("Replace-1-block scores", scores_section),
    ("Speed", speed_section),
    ("KV cache", kv_section),
    ("Training", curves_section),
    (TITLE, ablations_section),
    ("Results of all runs", results_section),
)


def report(run_dir: Path, folders: list[Path], title: str = "Report", samples: int = 1) -> dict[str, float]:
    """Write a report of runs.

    Args:
        run_dir: the run's folder; gets `report.html` and `pictures/`.
        folders: run folders, folders of pipelines, or folders that contain some, at most three levels below. Where
            several runs could be drawn in one place, it is the one with the newest run.json, and the others are named.
        title: heading of the page.
        samples: completions shown of each effort and kind.

    Returns:
        `runs`, `sections`, and of these `missing`, which could not be drawn.

    Raises:
        ValueError: a folder that does not exist, no complete run in any, or a negative number of samples.
    """
    if samples < 0:
        raise ValueError(f"samples {samples} was given; it must be at least 0.")
    found = find_runs(folders, run_dir)
    claim_inputs(run_dir, {str(run.folder): file_identity(run.folder, [RECORD]) for run in found.complete})
    sections = [drawn(title_, lambda make=make: make(found)) for title_, make in SECTIONS]  # type: ignore[misc]
    sections.append(drawn("Sample completions", lambda: samples_section(found, samples)))
    written = Report(title, run_date(run_dir), sections, found.complete, found.left_out)
    write_page(run_dir, written)
    record_output(run_dir, "report", file_identity(run_dir, [REPORT_FILE]))
    _print(run_dir, sections)
    missing = sum(section.missing is not None for section in sections)
    return {"runs": float(len(found.complete)), "sections": float(len(sections)), "missing": float(missing)}


def drawn(title: str, make: Callable[[], Section]) -> Section:
    """Return a section, or why it cannot be drawn."""
    try:
        return make()
    except DAMAGED as error:
        return Section(title, missing=f"It cannot be drawn: {type(error).__name__}: {error}")


def write_page(folder: Path, written: Report) -> None:
    """Write the pictures, then the page, which says that all is there."""
    (folder / PICTURES).mkdir(exist_ok=True)
    for section in written.sections:
        for picture in section.pictures:
            write_atomically(folder / PICTURES / f"{picture.name}.png", picture.png)
    write_atomically(folder / REPORT_FILE, page(written))


def _print(run_dir: Path, sections: Sequence[Section]) -> None:
    console = Console()
    for section in sections:
        if section.missing:
            console.print(f"{section.title}: {section.missing}", soft_wrap=True, markup=False)
    console.print(f"The report is in {run_dir / REPORT_FILE}", soft_wrap=True, markup=False)
