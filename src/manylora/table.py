"""The one table: built once from typed results, shown on a terminal, on a page, in a notebook, as CSV and as LaTeX.

Cells are values, not words; a column says how its numbers are shown. Every verb prints such tables, and the same ones
stand on the report's pages.
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table as TerminalTable

NONE = "–"
"""What stands where there is no value."""
_LONG = 60
"""A cell of a page that has more characters may break into lines."""
_FIRST = 24
"""Characters of the first column that are not folded on a terminal, whatever stands beside it."""
_COLUMN = 10
"""Characters of a column that is like its neighbours: "± 100.00" and the room beside it."""
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "Δ": r"$\Delta$", "±": r"$\pm$", "×": r"$\times$", "−": r"$-$",
    "≥": r"$\geq$", "≤": r"$\leq$", "²": r"$^2$", "σ": r"$\sigma$", "→": r"$\to$", "–": "--", "…": r"\dots{}",
    "\n": " ", "\t": " ",
    "[": "{[}", "*": "{*}",  # at the beginning of a row they would be arguments of the rule or line end above it
}  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that begins so for a formula."""
_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""They would let a task name reorder the text around it."""


class Spread(NamedTuple):
    """A mean and what it may be off by, such as half of its 95 % interval; NaN where that is not known."""

    mean: float
    half: float


Value: TypeAlias = str | float | int | Spread | None
"""A text, a number, a mean with its spread, or `None` for no value."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its heading, and how its numbers are shown."""

    name: str
    digits: int = 2
    """Decimals of what is not whole; CSV keeps them all."""
    form: str = ""
    """Format of all its numbers in place of `digits`, such as ".3g", or "d" for "1000" and not "1,000"."""
    unit: str = ""
    """Stands after each number, such as " %"."""
    align: Literal["", "left", "right"] = ""
    """Default: numbers stand to the right, texts to the left."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under headings, and below a line the rows that sum them up."""

    name: str
    """Beginning of the file names."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    """As many cells as columns; NaN and `None` are shown as a dash."""
    footer: tuple[tuple[Value, ...], ...] = ()
    hidden: bool = False
    """Whether it stands in the files only, not on the page."""
    grouped: bool = False
    """Whether rows with one first cell belong together: a terminal says it once and draws a line between groups."""
    alike: bool = False
    """Whether all columns but the first are of one kind, such as methods: on a terminal a spread stands below its mean,
    and columns that do not fit beside each other follow below."""
    marked: str = ""
    """First cell of the rows that stand out on a terminal."""

    @classmethod
    def of(
        cls,
        name: str,
        caption: str,
        rows: Sequence[Mapping[str, Value]],
        *,
        columns: Sequence[Column] = (),
        digits: int = 2,
        footer: Sequence[Mapping[str, Value]] = (),
        **more: Any,
    ) -> Table:
        """A table of rows that name their cells; a column stands where the first row that has it puts it.

        Args:
            name: beginning of the file names.
            caption: line above it.
            rows: heading to cell; a missing one is no value.
            columns: those that are shown otherwise than a plain one of `digits` decimals.
            digits: of the other columns.
            footer: rows below the line.
            more: other fields of `Table`.
        """
        own = {column.name: column for column in columns}
        headings = list(dict.fromkeys(heading for row in (*rows, *footer) for heading in row))
        return cls(
            name=name,
            caption=caption,
            columns=tuple(own.get(heading, Column(name=heading, digits=digits)) for heading in headings),
            rows=tuple(tuple(row.get(heading) for heading in headings) for row in rows),
            footer=tuple(tuple(row.get(heading) for heading in headings) for row in footer),
            **more,
        )

    def first_rows(self, most: int) -> Table:
        """The same with at most so many rows and a line that says how many more there are."""
        if len(self.rows) <= most:
            return self
        more = (f"… {len(self.rows) - most} more", *[""] * (len(self.columns) - 1))
        return replace(self, rows=(*self.rows[:most], more))

    def stands_right(self, index: int) -> bool:
        """Whether a column stands to the right, as numbers do."""
        if self.columns[index].align:
            return self.columns[index].align == "right"
        cells = [row[index] for row in (*self.rows, *self.footer)]
        return not any(isinstance(cell, str) and cell for cell in cells) and any(
            cell is not None for cell in cells
        )

    def words(self, row: Sequence[Value], *, minus: str = "−") -> list[str]:
        """A row's cells as they are shown."""
        return [
            words if isinstance(cell, str) else words.replace("-", minus)
            for cell, words in ((c, shown(c, column)) for c, column in zip(row, self.columns, strict=True))
        ]

    def _repr_html_(self) -> str:
        """For notebooks."""
        return to_html(self, alone=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[TerminalTable]:
        """For `console.print(table)`."""
        yield from to_terminal(self, width=options.max_width)


def clean(text: str) -> str:
    """`text` without characters that HTML, SVG, UTF-8 or a terminal cannot hold, or that reorder their surroundings."""
    if text.isprintable() and not any(sign in _BIDI for sign in text):
        return text
    return "".join(
        sign
        for sign in text
        if sign in "\n\t" or (unicodedata.category(sign) not in ("Cc", "Cs", "Cn") and sign not in _BIDI)
    )


def shown(cell: Value, column: Column) -> str:
    """A cell in words: "62.57", "1,600", "57.50 ± 2.10", "–"."""
    if isinstance(cell, str):
        return clean(cell)
    if isinstance(cell, Spread):
        mean = shown(cell.mean, column)
        return mean if math.isnan(cell.half) else f"{mean} ± {shown(cell.half, column)}"
    if cell is None or math.isnan(cell):
        return NONE
    whole = "," if isinstance(cell, int) else f",.{column.digits}f"
    return format(cell, column.form or whole) + column.unit


# ---- on a terminal


def to_terminal(table: Table, *, width: int) -> list[TerminalTable]:
    """For rich's console: one table, or several of which each fits `width` where the columns are alike."""
    if not table.alike:
        return [_drawn(table, broken=_width(table) > width)]
    names = [table.columns[0].name, *(row[0] for row in (*table.rows, *table.footer))]
    first = min(max(len(name) for name in names if isinstance(name, str)), width // 3)
    beside = max(1, (width - first - 2) // _COLUMN)
    parts = []
    for start in range(1, len(table.columns), beside):
        kept = [0, *range(start, min(start + beside, len(table.columns)))]
        part = replace(
            table,
            caption=table.caption if start == 1 else "",
            columns=tuple(table.columns[index] for index in kept),
            rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
            footer=tuple(tuple(row[index] for index in kept) for row in table.footer),
        )
        parts.append(_drawn(part, broken=True))
    return parts


def _width(table: Table) -> int:
    """Characters that the table takes with headings of one line."""
    lines = [[column.name for column in table.columns], *map(table.words, (*table.rows, *table.footer))]
    return 2 + sum(1 + max(map(len, column)) for column in zip(*lines, strict=True))


def _drawn(table: Table, *, broken: bool) -> TerminalTable:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as TerminalTable
    from rich.text import Text

    drawn = TerminalTable(
        title=Text(clean(table.caption), style="table.title") if table.caption else None,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(table.columns):
        right = table.stands_right(index)
        cells = [row[0] for row in table.rows if isinstance(row[0], str)] if index == 0 else []
        drawn.add_column(
            Text(_broken(clean(column.name)) if right and broken else clean(column.name)),
            justify="right" if right else "left",
            overflow="fold",
            min_width=min(_FIRST, max(map(len, cells), default=0)),
        )
    above: Value = None
    for index, row in enumerate(table.rows):
        words = table.words(row, minus="-")
        if table.grouped and index and row[0] != above:
            drawn.add_section()
        elif table.grouped and index:
            words[0] = ""
        above = row[0]
        if table.alike:
            words = [word.replace(" ± ", "\n± ") for word in words]
        drawn.add_row(*map(Text, words), style="bold" if table.marked and row[0] == table.marked else "")
    if table.footer:
        drawn.add_section()
    for row in table.footer:
        words = [word.replace(" ± ", "\n± ") if table.alike else word for word in table.words(row, minus="-")]
        drawn.add_row(*map(Text, words), style="bold")
    return drawn


def _broken(heading: str) -> str:
    """A heading of several lines, broken after blanks, hyphens and underscores, so that many columns fit."""
    lines = [""]
    for part in re.findall(r"[^-_ ]*[-_ ]?", heading):
        if part and lines[-1] and len((lines[-1] + part).rstrip()) > _COLUMN - 1:
            lines.append("")
        lines[-1] += part
    return "\n".join(map(str.rstrip, lines))


# ---- on a page, and for papers


def to_html(table: Table, *, alone: bool = False) -> str:
    """A `<table>` whose texts are escaped.

    Args:
        table: what to show.
        alone: whether it stands in no page of ours, so that it brings its caption and alignment along.
    """
    number = ' style="text-align: right"' if alone else ' class="number"'

    def line(row: Sequence[Value]) -> str:
        cells = []
        for index, words in enumerate(table.words(row)):
            kind = number if table.stands_right(index) else ' class="long"' if len(words) > _LONG else ""
            tag = "td" if index else 'th scope="row"'
            cells.append(f"<{tag}{kind}>{html.escape(words)}</{tag[:2]}>")
        return f"<tr>{''.join(cells)}</tr>\n"

    head = "".join(
        f'<th scope="col"{number if table.stands_right(index) else ""}>{html.escape(clean(column.name))}</th>'
        for index, column in enumerate(table.columns)
    )
    caption = f"<caption>{html.escape(clean(table.caption))}</caption>\n" if alone else ""
    foot = f"<tfoot>\n{''.join(map(line, table.footer))}</tfoot>\n" if table.footer else ""
    return (
        f"<table>\n{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(map(line, table.rows))}</tbody>\n"
        f"{foot}</table>"
    )


def to_csv(table: Table) -> str:
    """Comma-separated, numbers in full, a mean and its spread apart; no cell of a stranger's text is a formula to a
    spreadsheet."""
    rows = (*table.rows, *table.footer)
    apart = [any(isinstance(row[index], Spread) for row in rows) for index in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [
        [column.name, f"± {column.name}"][: 1 + two] for column, two in zip(table.columns, apart, strict=True)
    ]
    writer.writerow([_csv_cell(name) for pair in names for name in pair])
    for row in rows:
        pairs = [
            ([*cell] if isinstance(cell, Spread) else [cell, None])[: 1 + two]
            for cell, two in zip(row, apart, strict=True)
        ]
        writer.writerow([_csv_cell(cell) for pair in pairs for cell in pair])
    return out.getvalue()


def to_latex(table: Table) -> str:
    """A booktabs tabular with a comment that names the package it needs."""
    alignment = "".join("r" if table.stands_right(index) else "l" for index in range(len(table.columns)))
    lines = [
        f"% {' '.join(clean(table.caption).split())} (needs \\usepackage{{booktabs}})",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        _latex_row([column.name for column in table.columns]),
        r"\midrule",
        *(_latex_row(table.words(row)) for row in table.rows),
    ]
    if table.footer:
        lines += [r"\midrule", *(_latex_row(table.words(row)) for row in table.footer)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex_escaped(text: str) -> str:
    """`text` as LaTeX shows it, whatever it holds."""
    return "".join(_LATEX.get(sign, sign) for sign in clean(text))


def _csv_cell(cell: str | float | None) -> str:
    if not isinstance(cell, str):
        return "" if cell is None or math.isnan(cell) else str(cell)
    words = " ".join(clean(cell).splitlines())
    return "'" + words if words.lstrip().startswith(_FORMULA) else words


def _latex_row(words: Sequence[str]) -> str:
    return " & ".join(map(latex_escaped, words)) + r" \\"
