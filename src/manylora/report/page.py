"""What a page is made of, plain values which builders fill in, and how it is shown: one HTML file that loads nothing,
with its figures and tables beside it for papers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from manylora.files import make_folder, refuse_links, write_bytes
from manylora.report.style import css_variables, drawing, lay_out, to_inline, to_png, to_svg
from manylora.table import Table, clean, to_csv, to_html, to_latex

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure as Canvas

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Styles stand in the page, heat maps are pictures in it; nothing else may load or run."""
_HERE = Path(__file__).parent


class Plot(Protocol):
    """The numbers of a figure, which can draw themselves."""

    def draw(self, *, narrow: bool) -> Canvas:
        """The figure for a desktop or a paper, or (`narrow`) for a phone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot with the words that go with it."""

    name: str
    """Beginning of the file names, unlike those of the page's other figures."""
    title: str
    caption: str
    """What is drawn, with n and what the intervals mean."""
    alt: str
    """What the figure shows, for those who cannot see it."""
    plot: Plot


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with text, then figures, then tables."""

    title: str
    text: tuple[str, ...] = ()
    points: tuple[tuple[str, str], ...] = ()
    """A numbered list below the text: a word that stands out, and the rest."""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: bool = False
    """Whether the tables wait behind a click; they are printed nevertheless."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One report."""

    kind: str
    """The verb that wrote the folder."""
    question: str
    summary: str
    """The answer, in a sentence with n and seed."""
    warnings: tuple[str, ...] = ()
    """What a reader must know before the numbers, such as a failed run."""
    sections: tuple[Section, ...] = ()
    limits: tuple[str, ...] = ()
    """What the numbers do not show."""
    command: str = ""
    """The exact command; empty where it is not known."""
    versions: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    """Every setting of the run, defaults included."""


# ---- to a file


def write_page(page: Page, folder: Path) -> Path:
    """Write figures/, tables/ and at last report.html into `folder`; returns the last one's path.

    Raises:
        RunError: a link in the folder leads out of it.
        OSError: the folder cannot be written.
    """
    refuse_links(folder)
    figures, tables = folder / "figures", folder / "tables"
    drawn: dict[str, str] = {}
    for section in page.sections:
        for figure in section.figures:
            make_folder(figures)
            drawn[figure.name] = _draw(figure, figures)
        for table in section.tables:
            make_folder(tables)
            write_bytes(tables / f"{table.name}.csv", to_csv(table).encode())
            write_bytes(tables / f"{table.name}.tex", to_latex(table).encode())
    path = folder / "report.html"
    write_bytes(path, page_html(page, drawn).encode())
    return path


def page_html(page: Page, drawn: dict[str, str]) -> str:
    """The page's text.

    Args:
        page: what to show.
        drawn: by the figure's name, its SVG elements as `manylora.report.style.to_inline` returns them.
    """
    from markupsafe import Markup

    return _environment().get_template("page.html.jinja").render(
        page=page,
        policy=POLICY,
        style=Markup(_stylesheet()),
        drawn={name: Markup(svg) for name, svg in drawn.items()},
        to_html=lambda table: Markup(to_html(table)),
    )  # fmt: skip


def _draw(figure: Figure, folder: Path) -> str:
    """Write the figure's files and return it for the page, once for a desktop and once for a phone."""
    parts = []
    with drawing():
        for kind in ("wide", "narrow"):
            canvas = lay_out(figure.plot.draw(narrow=kind == "narrow"))
            name = f"{figure.name}-{kind}"
            svg = to_svg(canvas, salt=name, as_paths=False)
            parts.append(to_inline(svg, name=name, alt=figure.alt, kind=kind))
            if kind == "wide":
                files = to_svg(canvas, salt=name, as_paths=True).encode()
                write_bytes(folder / f"{figure.name}.svg", files)
                write_bytes(folder / f"{figure.name}.png", to_png(canvas))
    return "\n".join(parts)


@cache
def _stylesheet() -> str:
    rules = (_HERE / "page.css").read_text(encoding="utf-8")
    light, dark = css_variables(dark=False), css_variables(dark=True)
    scheme = f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    return scheme + rules


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, finalize=_finalize
    )


def _finalize(value: object) -> object:
    """Every text of a stranger passes here, and is escaped after."""
    return clean(value) if type(value) is str else value
