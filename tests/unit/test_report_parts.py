"""The parts of a page: tables for papers, reading without trust, one style, drawings that come out the same."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from manylora.errors import RunError
from manylora.files import Record, Several, forgive_lines, forgive_record
from manylora.report import Figure, Page, Plot, Section, write_page
from manylora.report.common import read_page_file, text
from manylora.report.heat import HeatMaps, HeatPanel, ink_on
from manylora.report.plots import (
    Intervals,
    Line,
    LinePanel,
    Lines,
    Point,
    Scatter,
    Series,
    Shares,
    Spot,
    named_and_others,
    thinned,
)
from manylora.report.style import (
    MARKS,
    css_variables,
    diverging,
    drawing,
    mark,
    sequential,
    short,
    short_names,
)
from manylora.table import Column, Table, clean, latex_escaped, to_csv, to_latex
from manylora.training.facts import LogLine

TABLE = Table(
    name="scores",
    caption="Scores, 100 % of them",
    columns=(Column(name="task"), Column(name="score"), Column(name="n")),
    rows=(("a_b & c", 62.567, 1600), ("none", None, None)),
    footer=(("mean", -0.5, 2),),
)


def test_csv_keeps_every_digit_and_latex_shows_two() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(TABLE))))
    assert rows == [
        ["task", "score", "n"],
        ["a_b & c", "62.567", "1600"],
        ["none", "", ""],
        ["mean", "-0.5", "2"],
    ]
    assert to_latex(TABLE).splitlines() == [
        r"% Scores, 100 % of them (needs \usepackage{booktabs})",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"task & score & n \\",
        r"\midrule",
        r"a\_b \& c & 62.57 & 1,600 \\",
        r"none & -- & -- \\",
        r"\midrule",
        r"mean & $-$0.50 & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_no_name_is_a_formula_to_a_spreadsheet() -> None:
    table = Table(
        name="t", caption="", columns=(Column(name="task"),), rows=(("=1+1",), ("@x",), ("-x",), ("fine",))
    )
    assert to_csv(table).splitlines()[1:] == ["'=1+1", "'@x", "'-x", "fine"]


@given(st.text())
def test_latex_has_no_command_of_a_stranger(words: str) -> None:
    shown = latex_escaped(words)
    for sign in "&%#_":
        assert shown.count(sign) == shown.count("\\" + sign)
    assert "\n" not in shown
    rest = shown
    for known in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"\textless{}", r"\textgreater{}",
                  r"\textbar{}", r"\textquotedbl{}", r"\dots{}", r"$\Delta$", r"$\pm$", r"$\times$", r"$\geq$",
                  r"$\leq$", "$-$", "$^2$", r"\&", r"\%", r"\$", r"\#", r"\_", r"\{", r"\}", "{[}", "{*}"):  # fmt: skip
        rest = rest.replace(known, "")
    assert not set(rest) & set("\\{}$^~")


@given(st.text())
def test_clean_text_survives_utf8_and_reorders_nothing(words: str) -> None:
    found = clean(words)
    assert found.encode().decode() == found
    assert "\x00" not in found
    assert "\u202e" not in found


class Found(Record):
    value: float | None = None
    entries: Several[float] = ()
    named: dict[str, int] = Field(default_factory=dict)


def test_values_of_another_type_are_missing_values() -> None:
    def forgiven(value: object) -> float | None:
        found = forgive_record({"value": value}, Found)
        assert found is not None
        return found.value

    assert [forgiven(value) for value in (1, 2.5, True, "3", None, math.nan, math.inf, 10**400, [1])] == [
        1.0, 2.5, *[None] * 7,
    ]  # fmt: skip
    found = forgive_record({"entries": [1, "x", None, 2], "named": {"a": 1, "b": "2"}}, Found)
    assert found == Found(entries=(1.0, 2.0), named={"a": 1})
    assert forgive_record([1], Found) is None
    assert text(["a", 1, None]) == "a, 1, –"
    assert text({"a": 1}) == "…"
    assert len(text("x" * 1000)) == 300


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": ' + "[" * 5000, "\xff"])
def test_a_broken_file_is_one_line_that_names_it(content: str, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"study\.json.*mend or remove it") as caught:
        read_page_file(path)
    assert "\n" not in str(caught.value)


def test_broken_settings_are_one_line_and_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [1,\n b: }", encoding="utf-8")
    with pytest.raises(RunError, match=r"config\.yaml") as caught:
        read_page_file(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    assert list(forgive_lines(tmp_path / "metrics.jsonl", LogLine)) == [LogLine(step=1)]


@pytest.mark.parametrize("line", [b"null", b"{", b"\xff", b'{"a": "\xff"}', b"", b"\0", b"[" * 5000])
def test_a_damaged_line_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(
        RunError, match=r"metrics\.jsonl:2 cannot be read \(.*\); mend or remove that line"
    ) as caught:
        list(forgive_lines(tmp_path / "metrics.jsonl", LogLine))
    assert "\n" not in str(caught.value)


# ---- style


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_series_stands_out_on_its_paper_and_from_every_other() -> None:
    themes = [
        dict(item.strip().split(": ") for item in css_variables(dark=dark).split(";")[:-1])
        for dark in (False, True)
    ]
    for theme, side in zip(themes, ("light", "dark"), strict=True):
        assert all(contrast(getattr(look, side), theme["--paper"]) >= 3 for look in MARKS)
        assert all(
            contrast(theme[name], theme[paper]) >= 4.5
            for name in ("--ink", "--soft")
            for paper in ("--paper", "--band")
        )
    looks = [mark(index) for index in range(64)]
    assert len({(look.light, look.marker) for look in looks}) == 64
    for part in ("light", "dark", "marker", "dash", "hatch"):
        assert len({str(getattr(look, part)) for look in looks[:8]}) == 8


def test_what_is_written_on_a_cell_can_be_read() -> None:
    for colours in (sequential(), diverging()):
        for step in range(256):
            cell = colours(step)
            shown = "#" + "".join(f"{round(255 * part):02x}" for part in cell[:3])
            assert contrast(ink_on(cell), shown) >= 4.4


def test_names_are_cut_where_they_do_not_differ() -> None:
    assert short("a" * 30, 9) == "aaaa…aaaa"
    assert short("two\nlines", 20) == "two lines"
    names = [f"a_long_common_beginning_{index}_and_a_long_common_end" for index in range(12)]
    found = short_names(names, 17)
    assert len(set(found)) == 12
    assert max(map(len, found)) <= 17
    assert short_names(["b", "b"], 5) == ["b", "b"]


@given(st.lists(st.text(alphabet="ab_", max_size=30), min_size=1, max_size=6), st.integers(5, 20))
def test_cut_names_are_never_longer_than_their_room(names: list[str], limit: int) -> None:
    assert all(len(name) <= limit for name in short_names(names, limit))


def test_long_curves_are_averaged_and_too_many_lose_their_names() -> None:
    assert thinned([1.0, 2.0]) == [1.0, 2.0]
    found = thinned([float(value) for value in range(1000)])
    assert len(found) == 250
    assert found[0] == 1.5
    lines = [Line(name=str(index), x=(0.0,), y=(float(index),)) for index in range(20)]
    kept, sentence = named_and_others(lines)
    assert [line.name for line in kept if not line.aside] == ["19", "18", "17", "16"]
    assert "other 16" in sentence
    assert named_and_others(lines[:8]) == (lines[:8], "")


# ---- drawings

POINT = Point(value=50.0, low=40.0, high=60.0)


def test_intervals_are_cut_at_the_ends_of_the_scale_and_values_are_not() -> None:
    wide = Series(name="m", points=(Point(value=50.0, low=-400.0, high=600.0),))
    beyond = Series(name="m", points=(Point(value=-7.0), Point(value=300.0)))
    with drawing():
        plot = Intervals(rows=("a",), series=(wide,), xlabel="", least=0.0, most=100.0)
        low, high = plot.draw(narrow=False).axes[0].get_xlim()
        assert -30 < low < 0 < 100 < high < 130
        plot = Intervals(rows=("a", "b"), series=(beyond,), xlabel="", least=0.0, most=100.0)
        low, high = plot.draw(narrow=False).axes[0].get_xlim()
        assert low < -7 < 300 < high


BOTH = (Series(name="_m", points=(POINT, None)), Series(name="n", points=(None, POINT)))
ONE = (Series(name="m", points=(POINT,)),)
CURVES = (
    Line(name="a", x=(0, 1), y=(1, 2), low=(0, 1), high=(2, 3)),
    Line(name="b", x=(0,), y=(1,), aside=True),
)
AT_ZERO = (Spot(name="a", x=0.0, y=POINT), Spot(name="b", x=0.0, y=Point(value=1.0)))
FAR = (Spot(name="a", x=1.0, y=POINT), Spot(name="b", x=1e6, y=POINT))
MAPS = (HeatPanel(title="A", values=((0.5, None),)), HeatPanel(title="B", values=((None, None),)))
PLOTS: dict[str, Plot] = {
    "intervals": Intervals(rows=("$x$ \\frac", "<b>"), series=BOTH, xlabel="score"),
    "one-value": Intervals(
        rows=("only",), series=(Series(name="m", points=(Point(value=3.0),)),), xlabel="x", zero=True
    ),
    "nothing-known": Intervals(rows=("a",), series=(Series(name="m", points=(None,)),), xlabel="x"),
    "sentences": Intervals(rows=("word " * 60,), series=ONE, xlabel="x", sentences=True),
    "lines": Lines(panels=(LinePanel(title="A", lines=CURVES, ylabel="y"),), xlabel="x"),
    "scatter": Scatter(spots=AT_ZERO, xlabel="x", ylabel="y"),
    "scatter-log": Scatter(spots=FAR, xlabel="x", ylabel="y"),
    "shares": Shares(rows=("a",), parts=("e0", "e1"), values=((0.25, 0.75),), xlabel="weight"),
    "heat": HeatMaps(panels=MAPS, rows=("0",), columns=("q", "v"), ylabel="layer", scale="cosine"),
}


def page(plots: Mapping[str, Plot], command: str = "") -> Page:
    figures = tuple(
        Figure(name=name, title=name, caption="n = 1", alt='what "it" shows <i>', plot=plot)
        for name, plot in plots.items()
    )
    section = Section(title="T", figures=figures, tables=(TABLE,))
    return Page(kind="train", question="Q?", summary="S.", sections=(section,), command=command)


def files_under(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class Elements(HTMLParser):
    """Tags that stand open, and every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_pages_are_whole_the_same_every_time_and_point_nowhere(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_page(page(PLOTS, command="manylora train"), tmp_path / name)
    first, second = files_under(tmp_path / "one"), files_under(tmp_path / "two")
    assert first == second
    assert {path.name for path in first} == {
        "report.html", "scores.csv", "scores.tex", *(f"{name}.{kind}" for name in PLOTS for kind in ("svg", "png")),
    }  # fmt: skip
    html = first[Path("report.html")].decode()
    elements = Elements()
    elements.feed(html)
    assert elements.open == []
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")
    ids = [value for _, name, value in elements.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value for _, name, value in elements.attributes if name in ("href", "src")]
    assert all(link.startswith(("#", "figures/", "tables/", "data:image/png;base64,")) for link in links)
    assert all(
        (tmp_path / "one" / link).is_file() for link in links if link.startswith(("figures/", "tables/"))
    )
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert not [name for _, name, _ in elements.attributes if name.startswith("on")]
    svgs = [value for tag, name, value in elements.attributes if tag == "svg" and name == "aria-label"]
    assert svgs == ['what "it" shows <i>'] * (2 * len(PLOTS))


@pytest.mark.parametrize("name", PLOTS)
def test_a_page_leaves_matplotlib_as_it_was(name: str) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with drawing():
        PLOTS[name].draw(narrow=True)
    assert dict(matplotlib.rcParams) == before


def test_every_text_of_a_page_is_escaped(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)> \" ' & \x00\ud800"
    table = Table(
        name="t", caption=bad, columns=(Column(name=bad),), rows=((bad,), (bad * 3,)), footer=((bad,),)
    )
    plot = Intervals(
        rows=(bad,), series=(Series(name=bad, points=(POINT,)), Series(name="b", points=(POINT,))), xlabel=bad
    )
    figure = Figure(name="f", title=bad, caption=bad, alt=bad, plot=plot)
    for folded in (False, True):
        section = Section(
            title=bad, text=(bad,), points=((bad, bad),), figures=(figure,), tables=(table,), folded=folded
        )
        whole = Page(
            kind=bad,
            question=bad,
            summary=bad,
            warnings=(bad,),
            sections=(section,),
            limits=(bad,),
            command=bad,
            versions=((bad, bad),),
            settings=((bad, bad),),
        )
        html = write_page(whole, tmp_path).read_text(encoding="utf-8")
        assert "<img" not in html
        assert html.count("&lt;img src=x onerror=alert(1)&gt;") > 20
        elements = Elements()
        elements.feed(html)
        assert elements.open == []
    assert "\x00" not in html


def test_the_files_for_papers_are_light_and_need_no_font(tmp_path: Path) -> None:
    write_page(page(PLOTS), tmp_path)
    svg = (tmp_path / "figures" / "intervals.svg").read_text(encoding="utf-8")
    assert "<text" not in svg
    assert "var(--" not in svg
    assert "<dc:date>" not in svg
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "var(--mark-1)" in html
    assert "$x$ \\frac" in html  # as it stands, not as mathematics
    assert not [word for word in ("Created with", "matplotlib.org", "<metadata") if word in html]
