"""Heat maps: one value per row and column, several panels on one scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora.report.style import (
    NARROW,
    ON_CELL,
    RULE,
    WIDE,
    diverging,
    few_ticks,
    new_figure,
    sequential,
    short_names,
    wrap,
)
from manylora.table import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROOM_TO_WRITE = 34.0
"""A cell at least so wide has its value written into it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatPanel:
    """One map."""

    title: str
    values: tuple[tuple[float | None, ...], ...]
    """By row and column; `None` where nothing is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMaps:
    """Panels of the same rows and columns."""

    panels: tuple[HeatPanel, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    ylabel: str
    scale: str
    """What the colours mean."""
    column_label: str = ""
    low: float = 0.0
    high: float = 1.0
    beside: int = 4
    """Panels beside each other on a desktop; a phone has two."""

    def draw(self, *, narrow: bool) -> Figure:
        """See `Plot.draw`."""
        import numpy as np

        across = min(len(self.panels), 2 if narrow else self.beside)
        across = 1 if narrow and len(self.columns) > 10 else across
        down = -(-len(self.panels) // across)
        width = NARROW if narrow else WIDE
        limit = 12 if narrow else 18
        columns, rows = short_names(self.columns, limit), short_names(self.rows, limit)
        under = min(130.0, 7.0 * max(map(len, columns))) if self._upright(columns) else 18.0
        each = min(26.0, max(9.0, 420.0 / len(rows)))
        titled = int(width / across / 8.5)
        over = 16.0 * max(len(wrap(panel.title, titled)) for panel in self.panels)
        figure = new_figure(width, down * (each * len(rows) + under + over + 26.0) + 62.0)
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        colours = (diverging() if self.low < 0 else sequential()).with_extremes(bad="none")
        shown: Any = None
        for axes in grid.flat[len(self.panels) :]:
            axes.set_visible(False)
        cell = (width - 110.0) / across / len(columns)
        for place, (axes, panel) in enumerate(zip(grid.flat, self.panels, strict=False)):
            values = np.array(
                [[np.nan if v is None else v for v in row] for row in panel.values], dtype=float
            )
            shown = axes.imshow(
                values, cmap=colours, vmin=self.low, vmax=self.high, aspect="auto", interpolation="none"
            )
            if cell >= _ROOM_TO_WRITE and each >= 14:
                self._write(axes, panel, shown)
            if panel.title:
                axes.set_title("\n".join(wrap(panel.title, titled)), fontsize=11)
            skip = 1 if self._upright(columns) else max(1, math.ceil(24.0 / cell))
            ticks = range(0, len(columns), skip)
            axes.set_xticks(ticks, columns[::skip], rotation=90 if self._upright(columns) else 0)
            every = max(1, round(14.0 / each))
            axes.set_yticks(range(0, len(rows), every), rows[::every])
            axes.tick_params(length=0, labelbottom=place + across >= len(self.panels))
            axes.spines[:].set_visible(False)
            axes.set_xlabel(clean(self.column_label))
            if place % across == 0:
                axes.set_ylabel(clean(self.ylabel))
        bar = figure.colorbar(
            shown,
            ax=grid,
            location="bottom",
            shrink=0.6 if narrow else 0.4,
            aspect=30,
            fraction=0.04,
            pad=0.02,
        )
        bar.set_label(clean(self.scale))
        bar.outline.set_edgecolor(RULE)
        bar.ax.tick_params(length=0)
        bar.ax.xaxis.set_major_locator(few_ticks(True))
        return figure

    def _upright(self, columns: list[str]) -> bool:
        """Whether the columns' names stand upright: words that are not short."""
        return max(map(len, columns)) > 3

    def _write(self, axes: Any, panel: HeatPanel, image: Any) -> None:
        for row, values in enumerate(panel.values):
            for column, value in enumerate(values):
                if value is None:
                    continue
                words = f"{value:.2f}".replace("-", "−")
                ink = ink_on(image.cmap(image.norm(value)))
                axes.text(column, row, words, ha="center", va="center", fontsize=9.5, color=ink, gid=ON_CELL)


def ink_on(cell: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out from a cell's colour by 4.5 : 1; no theme changes either."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in cell[:3]]
    bright = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if bright > 0.179 else "#fffffe"
