"""The one style of all figures, and how a drawing becomes a file or a part of the page.

The light colours are what matplotlib draws with and what the files for papers keep. In the page each of them becomes
a CSS variable of the same name, which the dark scheme sets anew: nothing is drawn twice for it.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from os.path import commonprefix
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from manylora.table import clean

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

WIDE, NARROW = 720.0, 340.0
"""Widths in CSS pixels: the page's column on a desktop, and a phone's. A figure is drawn for each."""
ON_CELL = "on-cell"
"""Class of text whose background is a heat map's cell."""
_UNIT = 72.0  # matplotlib's SVG has 72 units to the inch; one of ours is one CSS pixel
PNG_DPI = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How one series looks: never by its colour alone."""

    light: str
    dark: str
    marker: str
    hatch: str
    dash: Any


MARKS = (
    Mark(light="#0072b2", dark="#56b4e9", marker="o", hatch="", dash="-"),
    Mark(light="#d55e00", dark="#ff8f45", marker="s", hatch="////", dash=(0, (5, 1.5))),
    Mark(light="#00805d", dark="#2cc79a", marker="^", hatch="||||", dash=(0, (1.5, 1.2))),
    Mark(light="#b0568b", dark="#e59ac6", marker="D", hatch="xxxx", dash=(0, (6, 1.5, 1.5, 1.5))),
    Mark(light="#9a6a00", dark="#f0b83c", marker="v", hatch="\\\\\\\\", dash=(0, (3, 1.5))),
    Mark(light="#4b7f99", dark="#a9d5ec", marker="P", hatch="++++", dash=(0, (8, 2))),
    Mark(light="#454b52", dark="#d2d6da", marker="X", hatch="----", dash=(0, (2, 2, 1, 2))),
    Mark(light="#77761a", dark="#e3dc4a", marker="<", hatch="/|", dash=(0, (4, 1, 1, 1, 1, 1))),
)
"""The palette of Okabe and Ito (2008) in its order of use, darkened on white until lines stand out at 3 : 1."""

INK, SOFT, RULE, BAND, PAPER = "#1d2329", "#5a636d", "#d5dade", "#f3f5f6", "#ffffff"
_THEME = {
    "ink": (INK, "#e7eaed"),
    "soft": (SOFT, "#a9b2bb"),
    "rule": (RULE, "#39414a"),
    "band": (BAND, "#1e242a"),
    "paper": (PAPER, "#15191d"),
    **{f"mark-{index}": (mark.light, mark.dark) for index, mark in enumerate(MARKS)},
}
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in _THEME.items()}


@cache
def mark(index: int) -> Mark:
    """The look of series `index`; after the eighth the colours come again with other markers, 64 looks in all."""
    own, other = MARKS[index % len(MARKS)], MARKS[(index + 3 * (index // len(MARKS))) % len(MARKS)]
    return replace(own, marker=other.marker, hatch=other.hatch, dash=other.dash)


def css_variables(*, dark: bool) -> str:
    """The theme as CSS declarations."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in _THEME.items())


def sequential() -> Colormap:
    """Colours for values from low to high, readable without colour vision (cividis)."""
    import matplotlib

    return matplotlib.colormaps["cividis"]


def diverging() -> Colormap:
    """Colours for values to either side of zero (orange below, purple above)."""
    import matplotlib

    return matplotlib.colormaps["PuOr"]


def short(name: str, limit: int) -> str:
    """`name` on one line of at most `limit` characters; its middle goes, as names differ at their ends."""
    line = " ".join(clean(name).split())
    if len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return line[: limit - 1 - tail] + "…" + line[len(line) - tail :]


def short_names(names: Sequence[str], limit: int) -> list[str]:
    """`short` of each name; where some would look alike, what all of those share goes first."""
    found = [short(name, limit) for name in names]
    alike = [index for index, name in enumerate(found) if found.count(name) > 1]
    if len({names[index] for index in alike}) < 2:
        return found
    lines = [" ".join(clean(names[index]).split()) for index in alike]
    before = len(commonprefix(lines))  # noqa: RUF071 - letter by letter is what is meant
    after = len(commonprefix([line[before:][::-1] for line in lines]))  # noqa: RUF071
    for index, line in zip(alike, lines, strict=True):
        middle = line[before : len(line) - after]
        room = limit - len(middle) - 2  # for what is shared, and two dots
        kept = line[: min(before, max(0, room))]
        tail = "…" if after else ""
        found[index] = short(f"{kept}{'…' if len(kept) < before else ''}{middle}{tail}", limit)
    return found


def wrap(words: str, width: int) -> list[str]:
    """`words` in at most three lines of `width` characters."""
    return textwrap.wrap(" ".join(clean(words).split()), width, max_lines=3, placeholder=" …") or [""]


def label(line: str) -> str:
    """`line` for a legend, where matplotlib would hide a name that begins with an underscore."""
    return "\u200b" + line if line.startswith("_") else line


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many CSS pixels."""
    from matplotlib.figure import Figure as New

    return New(figsize=(width / _UNIT, height / _UNIT), layout="constrained", facecolor="none")


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in our style; matplotlib's own settings, the user's among them, stay out of it and as they are."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has more fonts
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11.5,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "text.color": INK,
    "text.parse_math": False,  # a task may be called "$x$"
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "hatch.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.04,
}


# ---- ticks and legends: as much as there is room for

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


# ---- from drawing to file and page


def lay_out(figure: Figure) -> Figure:
    """Find room for every label once, so that each file of the figure does not search for it anew."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def to_svg(figure: Figure, *, salt: str, as_paths: bool) -> str:
    """The figure as SVG, the same text for the same numbers.

    Args:
        figure: drawn inside `drawing`.
        salt: what its ids derive from.
        as_paths: letters as outlines, which look alike everywhere, instead of text.
    """
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path" if as_paths else "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue().decode("utf-8")


def to_png(figure: Figure) -> bytes:
    """The figure as PNG on white."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=PNG_DPI, facecolor=PAPER, metadata={"Software": None})
    return out.getvalue()


def to_inline(svg: str, *, name: str, alt: str, kind: str) -> str:
    """An SVG file's text as a part of a page: no ids but needed ones, no sizes, no names of colours.

    Args:
        svg: what `to_svg` returned.
        name: what every id begins with, so that two figures of a page never share one.
        alt: what the figure shows.
        kind: class of the element, "wide" or "narrow".
    """
    svg = re.sub(r"font-family: [^;\"]*;?|transform=\"rotate\(-?0 [^\"]*\"|\n *", _spare, svg)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _tag(child) in ("metadata", "style", "title"):
                parent.remove(child)
    for parent in list(root.iter()):
        for child in list(parent):
            if _tag(child) == "g" and not len(child):
                parent.remove(child)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    for element in root.iter():
        element.tag = _tag(element)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            plain = key.rpartition("}")[2]
            if value.startswith(ON_CELL):
                plain, value = "class", ON_CELL
            elif plain == "id":
                if value not in used:
                    continue
                value = f"{name}-{value}"
            elif plain == "href" and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            element.set(plain, _themed(value.replace("url(#", f"url(#{name}-")))
    view = root.get("viewBox", "0 0 0 0")
    root.attrib.clear()
    root.attrib |= {"viewBox": view, "class": f"plot {kind}", "role": "img", "aria-label": clean(alt)}
    root.set("style", f"max-width: {float(view.split()[2]):.0f}px")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _spare(found: re.Match[str]) -> str:
    """What the page needs not: its own font applies, most text stands level, and lines break nowhere."""
    return " " if found[0].startswith("\n") else ""


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _themed(value: str) -> str:
    return re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: _VARIABLES.get(found[0].lower(), found[0]), value)
