"""The one table: the same cells on a terminal, on a page, in a notebook, as CSV and as LaTeX."""

from __future__ import annotations

import csv
import io
import math

from rich.console import Console

from manylora.table import Column, Spread, Table, to_csv, to_html, to_latex


def printed(table: Table, *, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


MIXED = Table.of(
    "mixed",
    "A table [red]of all kinds",
    [
        {
            "task": "<b>",
            "score": 62.567,
            "n": 1600,
            "rate": 0.0005,
            "share": 12.34,
            "spread": Spread(5.0, 0.25),
        },
        {"task": "[red]", "score": math.nan, "n": None, "rate": None, "spread": Spread(-1.0, math.nan)},
    ],
    columns=[Column(name="rate", form="g"), Column(name="share", digits=1, unit=" %")],
    footer=[{"task": "mean", "score": -0.5, "n": 2}],
)


def test_a_cell_is_shown_alike_everywhere() -> None:
    lines = printed(MIXED)
    assert lines[0] == "A table [red]of all kinds"
    assert lines[1].split() == ["task", "score", "n", "rate", "share", "spread"]
    assert lines[3].split() == ["<b>", "62.57", "1,600", "0.0005", "12.3", "%", "5.00", "±", "0.25"]
    assert lines[4].split() == ["[red]", "–", "–", "–", "–", "-1.00"]
    assert lines[-1].split() == ["mean", "-0.50", "2", "–", "–", "–"]
    html = to_html(MIXED)
    assert '<th scope="row">&lt;b&gt;</th><td class="number">62.57</td><td class="number">1,600</td>' in html
    assert "−0.50" in html
    assert "<caption>" not in html
    assert r"<b> & 62.57".replace("<", r"\textless{}").replace(">", r"\textgreater{}") in to_latex(MIXED)
    assert r"5.00 $\pm$ 0.25" in to_latex(MIXED)


def test_csv_keeps_numbers_in_full_and_spreads_apart() -> None:
    assert to_csv(MIXED).splitlines() == [
        "task,score,n,rate,share,spread,± spread",
        "<b>,62.567,1600,0.0005,12.34,5.0,0.25",
        "[red],,,,,-1.0,",
        "mean,-0.5,2,,,,",
    ]


def test_a_cell_is_neither_a_formula_nor_a_command() -> None:
    table = Table.of(
        "t", "", [{"task": text} for text in ("=1+1", " =cmd|' /C calc'!A0", "\t@x", "[1ex]", "*")]
    )
    assert [row[0] for row in csv.reader(to_csv(table).splitlines())][1:] == [
        "'=1+1", "' =cmd|' /C calc'!A0", "'\t@x", "[1ex]", "*",
    ]  # fmt: skip
    latex = to_latex(table)
    assert "{[}1ex]" in latex
    assert "{*}" in latex


def test_a_notebook_shows_the_caption_and_needs_no_stylesheet() -> None:
    html = MIXED._repr_html_()
    assert "<caption>A table [red]of all kinds</caption>" in html
    assert "text-align: right" in html
    assert "class=" not in html


def test_columns_of_one_kind_go_below_each_other_where_they_do_not_fit() -> None:
    methods = [f"a-method-{index}" for index in range(9)]
    table = Table.of("t", "wide", [{"task": "x", **dict.fromkeys(methods, Spread(50.0, 1.0))}], alike=True)
    lines = printed(table, width=60)
    assert max(map(len, lines)) <= 60
    assert sum(line.split()[0] == "task" or line.strip().startswith("task") for line in lines) == 2
    assert sum(line.count("± 1.00") for line in lines) == 9
    assert printed(table, width=200)[0] == "wide"


def test_groups_are_named_once_on_a_terminal_and_in_every_row_of_a_file() -> None:
    rows = [{"matrix": matrix, "n": n} for matrix in "AB" for n in (1, 2)]
    table = Table.of("t", "", rows, grouped=True)
    assert [line.split()[0] for line in printed(table)[2:]] == ["A", "2", "B", "2"]
    assert [line.split(",")[0] for line in to_csv(table).splitlines()[1:]] == ["A", "A", "B", "B"]


def test_of_many_rows_the_first_are_shown_and_the_others_counted() -> None:
    table = Table.of("t", "", [{"client": f"c{index}", "n": index} for index in range(30)])
    assert printed(table.first_rows(24))[-1].strip() == "… 6 more"
    assert table.first_rows(30) is table
