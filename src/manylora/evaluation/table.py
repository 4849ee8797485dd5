"""Scores as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping

from manylora.evaluation.collapse import Loss
from manylora.evaluation.metrics import METRICS, metric_label
from manylora.evaluation.score import Estimate, Gains, Scores
from manylora.table import Column, Table, Value

_RIGHT = "became right"
"""Heading of the percentage of a task's rows that training has made right."""


def scores_table(
    scores: Scores,
    *,
    title: str = "test scores",
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    gains: Gains | None = None,
    every: bool = False,
) -> Table:
    """A table with one line per task and, below them, the mean over tasks.

    Columns: task, metric, score, its standard error, n, every further metric that a task has, and one column for each
    of `baselines`. A mean is over all tasks, so it stands only where every task has a value. The mean's standard
    error is that of test sampling (see `Scores.standard_error`).

    Args:
        scores: what to show.
        title: line above the table.
        baselines: column name to task to value; "mean" may be given as a task.
        gains: what training changed: columns "before", the base's score, and "became right", the percentage of the rows
            that became right.
        every: whether metrics that lead elsewhere, such as ROUGE-1 beside accuracy, have columns, too.
    """
    others = {
        name: values
        for name, values in scores.other_metrics().items()
        if every or name not in METRICS or not METRICS[name].leads
    }
    order = [name for name in (*METRICS, *others) if name in others]
    beside = {metric_label(name): others[name] for name in order} | dict(baselines or {})
    if gains:
        changed = {
            "before": {task: gain.before for task, gain in gains.items()},
            _RIGHT: {task: gain.became_right for task, gain in gains.items()},
        }
        beside = changed | beside
    rows: list[tuple[Value, ...]] = [
        (
            task.task,
            metric_label(task.metric),
            task.score,
            task.standard_error,
            task.n,
            *(values.get(task.task) for values in beside.values()),
        )
        for task in scores.tasks
    ]
    means = (_mean_of(values, scores) for values in beside.values())
    metric = scores.metric_label or "mixed"
    return Table(
        name="scores",
        caption=title,
        columns=tuple(
            Column(name=name, digits=0, unit=" %") if name == _RIGHT else Column(name=name)
            for name in ("task", "metric", "score", "s.e.", "n", *beside)
        ),
        rows=tuple(rows),
        footer=(("mean", metric, scores.mean, scores.standard_error, scores.n, *means),),
    )


def loss_table(before: Scores, after: Scores, loss: Loss, *, title: str) -> Table:
    """Scores of an adapter and of its LoRAs per task, and the points lost with the paired standard error."""

    def row(task: str, old: float, new: float, lost: Estimate | Loss, n: int) -> dict[str, Value]:
        error = lost.standard_error
        return {"task": task, "adapter": old, "LoRAs": new, "points lost": lost.mean, "s.e.": error, "n": n}

    rows = [
        row(one.task, one.score, after[one.task].score, loss.tasks[one.task], one.n) for one in before.tasks
    ]
    footer = row("mean", before.mean, after.mean, loss, before.n)
    return Table.of("loss", title, rows, footer=[footer], digits=1)


def _mean_of(values: Mapping[str, float], scores: Scores) -> float:
    if "mean" in values and "mean" not in scores.by_task():
        return values["mean"]
    return math.fsum(values.get(task.task, math.nan) for task in scores.tasks) / len(scores.tasks)
