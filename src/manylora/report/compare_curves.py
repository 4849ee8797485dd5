"""Scores over epochs, where a study scored its cells on the way."""

from __future__ import annotations

from typing import Any

from manylora.report.common import signed
from manylora.report.files import mapping, number, rows, text
from manylora.report.page import Figure, Section
from manylora.report.plots import Line, LinePanel, Lines
from manylora.table import Cell, Column, Table


def curves_section(study: dict[str, Any]) -> Section | None:
    """Mean score and Δm% against epochs, one curve per method; `None` where no cell was scored on the way."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows(study.get("curves")):
        epoch = number(row.get("epoch"))
        if epoch is not None and number(row.get("mean")) is not None:
            found.setdefault(text(row.get("method")), []).append((epoch, row))
    if not found:
        return None
    points = {method: sorted(own, key=lambda one: one[0]) for method, own in found.items()}
    scores = [_line(method, own) for method, own in points.items()]
    deltas = {
        method: [
            (x, delta)
            for x, row in own
            if number((delta := mapping(row.get("delta_m"))).get("mean")) is not None
        ]
        for method, own in points.items()
    }
    panels = [LinePanel(title="Mean score", lines=tuple(scores), ylabel="")]
    lines = tuple(_line(method, own) for method, own in deltas.items() if own)
    panels += [LinePanel(title="Δm% (lower is better)", lines=lines, ylabel="")] if lines else []
    figure = Figure(
        name="curves",
        title="What longer training does",
        caption="Means over seeds; the bands are their 95 % intervals, where more than one seed was scored.",
        alt="; ".join(f"{line.name} from {signed(line.y[0])} to {signed(line.y[-1])}" for line in scores)
        + ".",
        plot=Lines(panels=tuple(panels), xlabel="epoch"),
    )
    cells: tuple[tuple[Cell, ...], ...] = tuple(
        (method, x, *(number(row.get(key)) for key in ("mean", "low", "high")),
         number(mapping(row.get("delta_m")).get("mean")))
        for method, own in points.items() for x, row in own
    )  # fmt: skip
    columns = tuple(Column(name=name) for name in ("method", "epoch", "mean", "low", "high", "Δm%"))
    table = Table(name="curves", caption="Scores after each scored epoch", columns=columns, rows=cells)
    return Section(title="Over epochs", figures=(figure,), tables=(table,), folded=True)


def _line(name: str, points: list[tuple[float, dict[str, Any]]]) -> Line:
    lows, highs = ([number(row.get(key)) for _, row in points] for key in ("low", "high"))
    known = None not in lows and None not in highs
    return Line(
        name=name,
        x=tuple(x for x, _ in points),
        y=tuple(number(row.get("mean")) or 0.0 for _, row in points),
        low=tuple(value or 0.0 for value in lows) if known else (),
        high=tuple(value or 0.0 for value in highs) if known else (),
    )
