"""Ticks and legends that the plots share: as much as there is room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from manylora.report.style import INK, NARROW, PAPER, SOFT, WIDE, label, mark, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND_ROW = 19.0
"""Pixels of a line of names."""


def few_ticks(narrow: bool, *, whole: bool = False) -> Any:
    """As many ticks as their numbers have room for."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5 if narrow else 9, integer=whole, steps=[1, 2, 2.5, 5, 10])


def _columns(names: Sequence[str], narrow: bool) -> int:
    """Entries beside each other: as many as the longest name leaves room for."""
    longest = max((min(len(name), _name_limit(narrow)) for name in names), default=1)
    return max(1, min(len(names), int((NARROW if narrow else WIDE) // (longest * 6.6 + 46))))


def legend_lines(names: Sequence[str], narrow: bool) -> int:
    """Lines that a legend of these names takes."""
    return -(-len(names) // _columns(names, narrow))


def _name_limit(narrow: bool) -> int:
    return 38 if narrow else 44


def draw_legend(
    figure: Figure,
    entries: Sequence[tuple[str, int | None]],
    *,
    narrow: bool,
    curves: bool = False,
    bars: bool = False,
) -> None:
    """Names above the drawing; `entries` are (name, series), series `None` for what stands aside."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for _, index in entries:
        if index is None:
            handles.append(Line2D([], [], color=SOFT, linewidth=1.1, linestyle=(0, (3, 2))))
            continue
        look = mark(index)
        if bars:
            handles.append(Patch(facecolor=look.light, hatch=look.hatch, edgecolor=PAPER))
        else:
            handles.append(
                Line2D(
                    [],
                    [],
                    color=look.light,
                    marker=look.marker,
                    linestyle=look.dash if curves else "none",
                    markersize=7,
                    markeredgecolor=PAPER,
                    markeredgewidth=0.6,
                )
            )
    names = list(map(label, short_names([name for name, _ in entries], _name_limit(narrow))))
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=_columns(names, narrow),
        borderaxespad=0.1,
        borderpad=0.1,
        columnspacing=1.4,
        handlelength=2.6 if curves or bars else 1.0,
        handletextpad=0.6,
        labelcolor=INK,
    )
