"""Plots of values with intervals, of curves, and of points: each a plain value that draws itself.

Units are CSS pixels. A narrow drawing shows the same numbers; only names are shorter and legends taller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from manylora.report.style import (
    BAND,
    LEGEND_ROW,
    NARROW,
    PAPER,
    SOFT,
    WIDE,
    draw_legend,
    few_ticks,
    legend_lines,
    mark,
    new_figure,
    short_names,
    wrap,
)
from manylora.table import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 300
"""Points of a drawn curve; more are averaged in equal runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A value, and its interval where one is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One method's (or measure's) values, one per row; `None` where there is none."""

    name: str
    points: tuple[Point | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """Rows down the page, values to the right, series told apart by colour and marker."""

    rows: tuple[str, ...]
    series: tuple[Series, ...]
    xlabel: str
    zero: bool = False
    """Whether 0 is the line to compare with."""
    least: float = float("-inf")
    most: float = float("inf")
    separated: int = 0
    """So many last rows sum up the others."""

    sentences: bool = False
    """Whether the rows' names are so long that they stand above their values."""

    def draw(self, *, narrow: bool) -> Figure:
        """See `Plot.draw`."""
        several = len(self.series) > 1
        lines = legend_lines([one.name for one in self.series], narrow) if several else 0
        above = [wrap(row, 46 if narrow else 100) if self.sentences else [] for row in self.rows]
        each = self._height() + (15.0 * max(map(len, above)) + 4.0 if self.sentences else 0.0)
        figure = new_figure(NARROW if narrow else WIDE, each * len(self.rows) + 58.0 + LEGEND_ROW * lines)
        axes = figure.add_subplot()
        self._background(axes)
        sink = 0.5 - 0.5 * self._height() / each  # from the middle of a row to where its values stand
        step = 1.0 / (len(self.series) + 0.8) * self._height() / each
        for index, one in enumerate(self.series):
            _points(axes, one, shift=sink + (index - (len(self.series) - 1) / 2) * step, index=index)
        axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_yticks(range(len(self.rows)), short_names(self.rows, 17 if narrow else 34))
        axes.tick_params(axis="both", length=0)
        axes.grid(axis="x")
        axes.set_xlim(*self._limits())
        axes.xaxis.set_major_locator(few_ticks(narrow))
        axes.set_xlabel(clean(self.xlabel))
        axes.spines[["left", "bottom"]].set_visible(False)
        beside = axes.get_yaxis_transform()
        if self.sentences:
            axes.set_yticks([])
            for row, name in enumerate(above):
                behind = {"facecolor": PAPER if row % 2 else BAND, "edgecolor": "none", "pad": 1.5}
                axes.text(
                    0.01,
                    row - 0.5 + 5.0 / each,
                    "\n".join(name),
                    transform=beside,
                    va="top",
                    fontsize=11,
                    bbox=behind,
                )
        if several:
            draw_legend(figure, [(one.name, index) for index, one in enumerate(self.series)], narrow=narrow)
        else:
            for row, point in enumerate(self.series[0].points):
                if point is not None:
                    words = f"{point.value:.1f}".replace("-", "−")
                    axes.text(1.015, row + sink, words, transform=beside, va="center", fontsize=11)
        return figure

    def _height(self) -> float:
        """Pixels for the values of one row; series stand closer where there are many of both."""
        count = len(self.series)
        each = 9.0 if count * len(self.rows) <= 200 else 6.5
        return max(22.0, each * count + 7.0)

    def _background(self, axes: Axes) -> None:
        count = len(self.rows)
        for row in range(0, count, 2):
            axes.axhspan(row - 0.5, row + 0.5, color=BAND, linewidth=0, zorder=0)
        if self.zero:
            axes.axvline(0, color=SOFT, linewidth=1.2, zorder=1)
        if self.separated:
            axes.axhline(count - self.separated - 0.5, color=SOFT, linewidth=0.9, zorder=1)

    def _limits(self) -> tuple[float, float]:
        values = [
            value
            for one in self.series
            for point in one.points
            if point is not None
            for value in (point.value, point.low, point.high)
            if value is not None
        ]
        values += [0.0] if self.zero else []
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = max(high - low, 1e-9) * 0.06
        # Intervals may be cut at the ends of the scale, values never: their markers stay whole.
        middle = [point.value for one in self.series for point in one.points if point is not None]
        least, most = min([self.least, *middle]), max([self.most, *middle])
        return max(low - room, least - room / 3), min(high + room, most + room / 3)


def _points(axes: Axes, series: Series, *, shift: float, index: int) -> None:
    look = mark(index)
    for row, point in enumerate(series.points):
        if point is None:
            continue
        if point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [row + shift] * 2, color=look.light, linewidth=1.8, zorder=2,
                      solid_capstyle="butt")  # fmt: skip
    found = [(row + shift, point.value) for row, point in enumerate(series.points) if point is not None]
    axes.plot(
        [value for _, value in found],
        [at for at, _ in found],
        linestyle="none",
        marker=look.marker,
        color=look.light,
        markeredgecolor=PAPER,
        markeredgewidth=0.8,
        markersize=6.5,
        zorder=3,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    """With `high`, a band around it."""
    high: tuple[float, ...] = ()
    aside: bool = False
    """Whether it is one of many in the background, or a thing to compare with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinePanel:
    """Curves that share two axes."""

    title: str
    lines: tuple[Line, ...]
    ylabel: str
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Panels of curves over the same x, with one legend; a curve of one name looks alike in all panels."""

    panels: tuple[LinePanel, ...]
    xlabel: str
    whole: bool = False
    """Whether x counts things."""

    def draw(self, *, narrow: bool) -> Figure:
        """See `Plot.draw`."""
        names = list(
            dict.fromkeys(line.name for panel in self.panels for line in panel.lines if not line.aside)
        )
        aside = list(dict.fromkeys(line.name for panel in self.panels for line in panel.lines if line.aside))
        shown = [*names, *([aside[0]] if len(set(aside)) == 1 else [])]
        columns = 1 if narrow else min(len(self.panels), 3)
        down = -(-len(self.panels) // columns)
        lines = legend_lines(shown, narrow) if len(shown) > 1 else 0
        figure = new_figure(
            NARROW if narrow else WIDE,
            (200.0 if narrow or columns > 1 else 270.0) * down + 22 + LEGEND_ROW * lines,
        )
        grid = figure.subplots(down, columns, squeeze=False, sharex=True)
        for axes in grid.flat[len(self.panels) :]:
            axes.set_visible(False)
        for place, (axes, panel) in enumerate(zip(grid.flat, self.panels, strict=False)):
            for line in panel.lines:
                _curve(axes, line, None if line.aside else names.index(line.name))
            axes.set_title(clean(panel.title))
            axes.set_ylabel(clean(panel.ylabel))
            if place + columns >= len(self.panels):
                axes.set_xlabel(clean(self.xlabel))
                axes.tick_params(axis="x", labelbottom=True)
            axes.grid(axis="y")
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(bottom=panel.least, top=panel.most)
            axes.xaxis.set_major_locator(few_ticks(narrow or columns > 1, whole=self.whole))
        if len(shown) > 1:
            entries = [(name, index if index < len(names) else None) for index, name in enumerate(shown)]
            draw_legend(figure, entries, narrow=narrow, curves=True)
        return figure


def _curve(axes: Axes, line: Line, index: int | None) -> None:
    x, y = thinned(line.x), thinned(line.y)
    if index is None:
        axes.plot(x, y, color=SOFT, linewidth=1.1, linestyle=(0, (3, 2)), zorder=1)
        return
    look = mark(index)
    if line.low and line.high:
        axes.fill_between(
            x, thinned(line.low), thinned(line.high), color=look.light, alpha=0.16, linewidth=0, zorder=1
        )
    every = max(1, len(x) // 8)
    axes.plot(x, y, color=look.light, linestyle=look.dash, marker=look.marker, markevery=every,
              markeredgecolor=PAPER, markeredgewidth=0.6, zorder=2)  # fmt: skip


MOST_NAMED = 8
"""Curves of one panel that can be told apart."""


def named_and_others(lines: Sequence[Line]) -> tuple[list[Line], str]:
    """Where there are too many curves, only the four that lie highest (by their means) keep their names.

    Returns:
        The curves, those without a name first, and a sentence that says so, or "".
    """
    if len(lines) <= MOST_NAMED:
        return list(lines), ""
    highest = sorted(lines, key=lambda line: -sum(line.y) / len(line.y))[:4]
    others = [replace(line, name="the others", aside=True) for line in lines if line not in highest]
    return [*others, *highest], f"The four highest have names, the other {len(others)} do not. "


def thinned(values: Sequence[float]) -> list[float]:
    """At most `_MOST_POINTS` values: the means of equal runs of them."""
    if len(values) <= _MOST_POINTS:
        return list(values)
    run = -(-len(values) // _MOST_POINTS)
    parts = [values[start : start + run] for start in range(0, len(values), run)]
    return [sum(part) / len(part) for part in parts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """A named point of two values, the upright one with an interval where one is known."""

    name: str
    x: float
    y: Point


@dataclass(frozen=True, kw_only=True, slots=True)
class Scatter:
    """What something costs to the right, what it brings upward."""

    spots: tuple[Spot, ...]
    xlabel: str
    ylabel: str

    def draw(self, *, narrow: bool) -> Figure:
        """See `Plot.draw`."""
        names = [spot.name for spot in self.spots]
        figure = new_figure(NARROW if narrow else WIDE, 290.0 + LEGEND_ROW * legend_lines(names, narrow))
        axes = figure.add_subplot()
        for index, spot in enumerate(self.spots):
            look = mark(index)
            if spot.y.low is not None and spot.y.high is not None:
                axes.plot([spot.x] * 2, [spot.y.low, spot.y.high], color=look.light, linewidth=1.8, zorder=2)
            axes.plot([spot.x], [spot.y.value], color=look.light, marker=look.marker, linestyle="none",
                      markersize=9, markeredgecolor=PAPER, markeredgewidth=0.9, zorder=3)  # fmt: skip
        known = [spot.x for spot in self.spots]
        if min(known) > 0 and max(known) / min(known) >= 20:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(few_ticks(narrow))
            space = max(max(known) - min(known), max(known) * 0.1, 1e-9) * 0.08
            axes.set_xlim(max(0.0, min(known) - space) if min(known) else -space, max(known) + space)
        axes.grid()
        axes.tick_params(length=0)
        axes.set_xlabel(clean(self.xlabel))
        axes.set_ylabel(clean(self.ylabel))
        draw_legend(figure, [(name, index) for index, name in enumerate(names)], narrow=narrow)
        return figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Rows whose parts add up to 1, told apart by colour and hatching."""

    rows: tuple[str, ...]
    parts: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    """One row of parts per row."""
    xlabel: str

    def draw(self, *, narrow: bool) -> Figure:
        """See `Plot.draw`."""
        lines = legend_lines(list(self.parts), narrow)
        figure = new_figure(NARROW if narrow else WIDE, 25.0 * len(self.rows) + 58.0 + LEGEND_ROW * lines)
        axes = figure.add_subplot()
        for row, values in enumerate(self.values):
            left = 0.0
            for index, value in enumerate(values):
                look = mark(index)
                axes.barh(row, value, left=left, height=0.68, color=look.light, hatch=look.hatch,
                          edgecolor=PAPER, linewidth=0.9)  # fmt: skip
                left += value
        axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_yticks(range(len(self.rows)), short_names(self.rows, 17 if narrow else 34))
        axes.set_xlim(0, 1)
        axes.tick_params(length=0)
        axes.set_xlabel(clean(self.xlabel))
        axes.spines[["left", "bottom"]].set_visible(False)
        draw_legend(
            figure, [(part, index) for index, part in enumerate(self.parts)], narrow=narrow, bars=True
        )
        return figure
