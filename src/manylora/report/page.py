"""What a page is made of: plain values, which builders fill in and one renderer shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from manylora.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


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
