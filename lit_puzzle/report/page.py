"""A report as data, and as one HTML page without network: pictures for light and dark screens are inside it.

Reads `page.html.jinja`; writes nothing. Needs jinja2; imports no torch.
"""

from __future__ import annotations

import base64
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lit_puzzle.report.figures import DARK, LIGHT, Draw, png, svg
from lit_puzzle.report.run_summary import RunSummary

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes:
        name: of its PNG file.
        says: what it shows, for those who cannot see it.
        svgs: color scheme -> the picture as SVG.
        png: the picture as PNG.
    """

    name: str
    says: str
    svgs: Mapping[str, bytes]
    png: bytes

    @classmethod
    def drawn(cls, name: str, says: str, draw: Draw) -> Picture:
        """Draw a picture in every form that the report needs."""
        drawn = cls(name, says, {colors.scheme: svg(draw, colors) for colors in (LIGHT, DARK)}, png(draw))
        gc.collect()  # figures refer to themselves: else those of many pictures pile up
        return drawn


@dataclass(frozen=True)
class Table:
    """A table: the first cell of a row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Sample:
    """Completions of parent and child for one prompt.

    Attributes:
        title: task, effort and problem.
        texts: label -> text.
    """

    title: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """A section of the report, with the runs that its numbers are from.

    Attributes:
        title: its heading.
        text: paragraphs.
        pictures: its pictures.
        tables: its tables.
        samples: sample completions.
        sources: runs that all of its numbers are from.
        missing: what would have to be run for it; None: all is there.
    """

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    sources: Sequence[RunSummary] = ()
    missing: str | None = None

    @property
    def anchor(self) -> str:
        """The name by which links find it."""
        return self.title.lower().replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    Attributes:
        title: of the page.
        date: of the run.
        sections: in their order.
        left_out: folder -> why it takes no part.
        runs: every run, for the table of sources.
    """

    title: str
    date: str
    sections: Sequence[Section]
    runs: Sequence[RunSummary]
    left_out: Mapping[Path, str] = field(default_factory=dict)


def page(report: Report) -> str:
    """Return the HTML page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    places = {run.folder: number for number, run in enumerate(report.runs, start=1)}
    images = {
        picture.name: {scheme: _inline(image) for scheme, image in picture.svgs.items()}
        for section in report.sections
        for picture in section.pictures
    }
    return environment.get_template(TEMPLATE).render(report=report, places=places, images=images)


def _inline(image: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}"
