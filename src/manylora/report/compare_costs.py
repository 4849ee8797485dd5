"""What the methods of a study cost: parameters, time, memory, bytes that travel, and the score against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from manylora.report.common import point_of, signed
from manylora.report.files import mean, number, text
from manylora.report.page import Figure, Section
from manylora.report.plots import Scatter, Spot
from manylora.table import Cell, Column, Table

_MEAN = "mean"
_MIB = 1024.0**2
_BYTES = ("bytes", "bytes_up", "bytes_down")
"""What a federated cell may say of the messages of a client and round: both ways together, or each."""


def cost_section(
    cells: list[dict[str, Any]], table: list[dict[str, Any]], costs: list[dict[str, Any]]
) -> Section | None:
    """What a cell of each method costs, and the score against its bytes; `None` without a cell.

    Args:
        cells: of the study.
        table: mean scores.
        costs: time and memory per method as the study counts them, which leaves out the time of cells that went on
            after a kill; a method that is not in it has the mean over its cells.
    """
    methods = list(dict.fromkeys(text(cell.get("method")) for cell in cells))
    if not methods:
        return None
    by_method = {name: [cell for cell in cells if text(cell.get("method")) == name] for name in methods}
    found: list[tuple[Cell, ...]] = []
    sent = {name: _mean_of(by_method[name], _bytes_of) for name in methods}
    for name in methods:
        own = by_method[name]
        parameters = _mean_of(own, lambda cell: number(cell.get("parameters")))
        counted = [row for row in costs if text(row.get("method")) == name] or own
        seconds = _mean_of(counted, lambda cell: number(cell.get("seconds")))
        peak = _mean_of(counted, lambda cell: number(cell.get("peak_bytes")))
        row: tuple[Cell, ...] = (
            name,
            None if parameters is None else round(parameters),
            seconds,
            None if peak is None else peak / _MIB,
            *((None if sent[name] is None else (sent[name] or 0.0) / _MIB,) if any(sent.values()) else ()),
            len(own),
        )
        found.append(row)
    columns = [
        Column(name="method"), Column(name="trainable parameters"), Column(name="seconds", digits=1),
        Column(name="peak MiB", digits=0),
        *([Column(name="MiB sent a client and round")] if any(sent.values()) else []), Column(name="cells"),
    ]  # fmt: skip
    shown = Table(
        name="cost",
        caption="What a cell costs: mean time over its method’s cells, and the highest memory",
        columns=tuple(columns),
        rows=tuple(found),
    )
    return Section(title="Cost", figures=_quality(by_method, table, sent), tables=(shown,))


def _quality(
    by_method: Mapping[str, list[dict[str, Any]]],
    table: list[dict[str, Any]],
    sent: Mapping[str, float | None],
) -> tuple[Figure, ...]:
    """Mean score against the bytes that travel where cells say so, else against the bytes of the adapter."""
    means = {text(row.get("method")): row for row in table if text(row.get("task")) == _MEAN}
    travels = any(sent.values())
    spots = []
    for name, cells in by_method.items():
        point = point_of(means[name]) if name in means else None
        size = sent[name] if travels else _mean_of(cells, lambda cell: number(cell.get("parameters")))
        if point is not None and size is not None and size >= 0:
            spots.append(Spot(name=name, x=(size if travels else 4 * size) / _MIB, y=point))
    if len(spots) < 2:
        return ()
    what = "MiB up and down a client and round" if travels else "adapter in MiB, 4 bytes a parameter"
    return (
        Figure(
            name="quality-bytes",
            title="Quality against bytes",
            caption=f"Mean score with its 95 % interval over seeds; to the right: {what}.",
            alt="; ".join(f"{spot.name}: {signed(spot.y.value)} at {signed(spot.x, 2)} MiB" for spot in spots)
            + ".",
            plot=Scatter(spots=tuple(spots), xlabel=what, ylabel="mean score"),
        ),
    )


def _bytes_of(cell: Mapping[str, Any]) -> float | None:
    known = [value for key in _BYTES if (value := number(cell.get(key))) is not None]
    return sum(known) if known else None


def _mean_of(cells: list[dict[str, Any]], read: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    return mean(value for cell in cells if (value := read(cell)) is not None)
