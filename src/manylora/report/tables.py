"""A table of a page, and the same as CSV and LaTeX for papers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from manylora.report.files import clean

Cell = str | float | int | None

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "Δ": r"$\Delta$", "±": r"$\pm$", "×": r"$\times$", "−": r"$-$",
    "≥": r"$\geq$", "≤": r"$\leq$", "²": r"$^2$", "–": "--", "…": r"\dots{}", "\n": " ", "\t": " ",
}  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that begins so for a formula."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its heading, and how its numbers are shown."""

    name: str
    digits: int = 2
    """Decimals of a float; CSV keeps them all."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under headings, and below a line the rows that sum them up."""

    name: str
    """Beginning of the file names."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """As many cells as columns; `None` is shown as a dash."""
    footer: tuple[tuple[Cell, ...], ...] = ()
    hidden: bool = False
    """Whether it stands in the files only, not on the page."""


def shown(cell: Cell, column: Column) -> str:
    """A cell in words: "62.57", "1,600", "–"."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return clean(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:,.{column.digits}f}".replace("-", "−")


def is_numeric(table: Table, index: int) -> bool:
    """Whether a column holds numbers, which stand to the right."""
    cells = [row[index] for row in (*table.rows, *table.footer)]
    return not any(isinstance(cell, str) for cell in cells) and any(cell is not None for cell in cells)


def to_csv(table: Table) -> str:
    """Comma-separated, numbers in full; no cell of a stranger's text is a formula to a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_plain(column.name) for column in table.columns])
    for row in (*table.rows, *table.footer):
        writer.writerow(["" if cell is None else _plain(cell) for cell in row])
    return out.getvalue()


def to_latex(table: Table) -> str:
    """A booktabs tabular with a comment that names the package it needs."""
    alignment = "".join("r" if is_numeric(table, index) else "l" for index in range(len(table.columns)))
    lines = [
        f"% {' '.join(clean(table.caption).split())} (needs \\usepackage{{booktabs}})",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        _latex_row([column.name for column in table.columns]),
        r"\midrule",
        *(_latex_row(_words(row, table)) for row in table.rows),
    ]
    if table.footer:
        lines += [r"\midrule", *(_latex_row(_words(row, table)) for row in table.footer)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex_escaped(text: str) -> str:
    """`text` as LaTeX shows it, whatever it holds."""
    return "".join(_LATEX.get(sign, sign) for sign in clean(text))


def _plain(cell: Cell) -> str:
    if not isinstance(cell, str):
        return str(cell)
    words = " ".join(clean(cell).splitlines())
    return "'" + words if words.startswith(_FORMULA) else words


def _words(row: Sequence[Cell], table: Table) -> list[str]:
    return [shown(cell, column) for cell, column in zip(row, table.columns, strict=True)]


def _latex_row(words: Sequence[str]) -> str:
    return " & ".join(map(latex_escaped, words)) + r" \\"
