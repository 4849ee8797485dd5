"""The tables of a study."""

from __future__ import annotations

import math

from manylora.evaluation.metrics import metric_label
from manylora.studies.costs import CELL_METRICS, costs_of
from manylora.studies.records import ClaimTrial, DeltaM, Interval, Score, Summary
from manylora.table import Column, Spread, Table, Value

DELTA = "Δm%"


def scores_table(summary: Summary) -> Table:
    """Methods × tasks, the more of them as rows; the last task is the mean, and Δm% where there is one."""
    cells = {(row.method, row.task): _spread(row) for row in summary.table}
    cells |= {(row.method, DELTA): _spread(row) for row in summary.delta_m}
    methods = list(dict.fromkeys(row.method for row in summary.table))
    tasks = [*dict.fromkeys(row.task for row in summary.table), *([DELTA] if summary.delta_m else [])]
    n = max((row.n for row in summary.table if row.n is not None), default=0)
    caption = "test score, mean ± 95 % interval over " + ("1 seed" if n == 1 else f"{n} seeds")
    if summary.delta_m:
        caption += "; Δm%: mean relative loss against single-task training, lower is better"
    down, names, beside = (
        ("method", methods, tasks) if len(methods) > len(tasks) else ("task", tasks, methods)
    )
    key = (lambda name, other: (name, other)) if down == "method" else (lambda name, other: (other, name))
    return Table(  # not `Table.of`: a method may be called as a column is
        name="scores",
        caption=caption,
        columns=tuple(Column(name=name) for name in (down, *beside)),
        rows=tuple((name, *(cells.get(key(name, other)) for other in beside)) for name in names),
        alike=True,
    )


def long_table(summary: Summary) -> Table:
    """The same, one line per method and task, for files."""
    rows: list[dict[str, Value]] = [
        {"method": row.method, "task": row.task, "mean": row.mean, **_bounds(row), "n": row.n}
        for row in summary.table
    ]
    return Table.of("scores-long", "The same, one line per method and task", rows, hidden=True)


def others_table(summary: Summary) -> Table:
    """Metrics beside the main ones: per method the mean over the tasks that have them."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in summary.others:
        found.setdefault(row.method, {}).setdefault(metric_label(row.metric), []).append(row.mean)
    rows: list[dict[str, Value]] = [
        {"method": method, **{label: math.fsum(values) / len(values) for label, values in own.items()}}
        for method, own in found.items()
    ]
    return Table.of("metrics", "further metrics: means over seeds and over the tasks that have them", rows)


def delta_table(summary: Summary) -> Table:
    """Δm% of each method."""
    rows: list[dict[str, Value]] = [
        {"method": row.method, DELTA: row.mean, **_bounds(row), "n": row.n} for row in summary.delta_m
    ]
    return Table.of("delta-m", "Δm% with its 95 % interval", rows)


def costs_table(summary: Summary) -> Table:
    """What a cell of each method costs: every metric of `CELL_METRICS` that has a heading."""
    known = {costs.method: costs for costs in summary.costs}
    rows: list[dict[str, Value]] = []
    for method, cells in summary.by_method().items():
        costs = known.get(method) or costs_of(method, cells)
        rate = summary.learning_rates.get(method)
        row: dict[str, Value] = {"method": method, "learning rate": "default" if rate is None else rate}
        for name, metric in CELL_METRICS.items():
            value = costs.value_of(name)
            value = metric.of(cells) if value is None else value
            if metric.heading and (value is not None or not metric.optional):
                row[metric.heading] = (
                    None if value is None else value / metric.unit if metric.unit != 1 else value
                )
            if name == "seconds" and costs.seconds_low is not None and costs.seconds_high is not None:
                row["(range)"] = f"{costs.seconds_low:.1f}–{costs.seconds_high:.1f}"
        rows.append({**row, "cells": len(cells)})
    columns = [Column(name=one.heading, digits=one.digits) for one in CELL_METRICS.values() if one.heading]
    columns += [Column(name="learning rate", form="g", align="right"), Column(name="(range)", align="right")]
    return Table.of("cost", "cost of a cell", rows, columns=columns)


def curves_table(summary: Summary) -> Table:
    """Scores after each scored epoch."""
    rows: list[dict[str, Value]] = [
        {
            "method": row.method,
            "epoch": row.epoch,
            "mean": row.mean,
            **_bounds(row),
            DELTA: None if row.delta_m is None else row.delta_m.mean,
        }
        for row in summary.curves
    ]
    caption = "mean score after epochs (Δm% against single-task training of as many)"
    return Table.of("curves", caption, rows, columns=[Column(name="epoch", form="g")], grouped=True)


def claims_table(summary: Summary) -> Table:
    """Every number behind each claim."""
    rows: list[dict[str, Value]] = [
        {
            "claim": one.claim or one.text,
            "verdict": one.verdict,
            "difference": one.difference,
            **_bounds(one),
            "p": one.p,
            "p (Holm)": one.p_holm,
            "bootstrap low": one.bootstrap[0],
            "bootstrap high": one.bootstrap[1],
            "detectable": one.detectable,
            "n": one.n,
        }
        for one in summary.claims
    ]
    caption = "Differences in points with 95 % intervals; p of the paired t test, and after Holm’s correction"
    digits = [Column(name=name, digits=4) for name in ("p", "p (Holm)")]
    return Table.of("claims", caption, rows, columns=digits)


def cells_table(summary: Summary) -> Table:
    """Every method and seed."""
    rows: list[dict[str, Value]] = [
        {
            "method": cell.method,
            "seed": cell.seed,
            "learning rate": cell.learning_rate,
            "mean score": cell.mean,
            "seconds": cell.seconds,
        }
        for cell in summary.cells
    ]
    columns = [
        Column(name="seed", form="d"),
        Column(name="learning rate", digits=6),
        Column(name="seconds", digits=1),
    ]
    return Table.of("cells", "all cells: every method and seed", rows, columns=columns)


def _spread(row: Score | DeltaM) -> Spread:
    return Spread(row.mean, row.half)


def _bounds(row: Interval | ClaimTrial) -> dict[str, Value]:
    return {"low": row.low, "high": row.high}
