"""Scores as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from manylora.evaluation.score import (
    ACCURACY,
    EXACT_MATCH,
    OPTION_ACCURACY,
    ROUGE1,
    ROUGE1_PUBLISHED,
    STRICT_ACCURACY,
    Scores,
    TaskScore,
)

METRIC_LABELS: Mapping[str, str] = {
    ACCURACY: "accuracy",
    ROUGE1: "ROUGE-1",
    ROUGE1_PUBLISHED: "ROUGE-1 a–z",
}
_SECONDARY: Mapping[str, str] = {
    EXACT_MATCH: "exact match",
    OPTION_ACCURACY: "option acc.",
    STRICT_ACCURACY: "strict acc.",
}
_NONE = "–"


def scores_table(
    scores: Scores, *, title: str | None = None, extra: Mapping[str, Mapping[str, float]] | None = None
) -> Table:
    """A table with one line per task and the mean over tasks as its last line.

    Columns: task, metric, score, its standard error, n, exact match, and option accuracy and the strict
    reading where a task has them; then one column for each entry of `extra`. "–" stands where there is no
    value; a mean is over all tasks, so it stands only where every task has a value. The mean's standard error
    is that of test sampling (see `Scores.standard_error`).

    Args:
        scores: what to show.
        title: line above the table.
        extra: column name to task to value, such as baselines; "mean" may be given as a task.
    """
    # Narrow enough for eight tasks and two more columns on 80 characters; headings break at blanks.
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold", min_width=min(24, max(len(task.task) for task in scores.tasks)))
    table.add_column("metric", no_wrap=True)
    shown = {
        name: label
        for name, label in _SECONDARY.items()
        if any(name in task.metrics for task in scores.tasks)
    }
    for heading in ("score", "s.e.", "n", *shown.values(), *(extra or {})):
        table.add_column(heading.replace(" ", "\n"), justify="right")
    for task in scores.tasks:
        table.add_row(
            task.task,
            METRIC_LABELS.get(task.metric, task.metric),
            _number(task.score),
            _number(task.standard_error),
            str(task.n),
            *(_number(_metric(task, name)) for name in shown),
            *(_number(column.get(task.task, math.nan)) for column in (extra or {}).values()),
        )
    table.add_section()
    kinds = {task.metric for task in scores.tasks}
    kind = next(iter(kinds)) if len(kinds) == 1 else "mixed"
    table.add_row(
        "mean",
        METRIC_LABELS.get(kind, kind),
        _number(scores.mean),
        _number(scores.standard_error),
        str(scores.n),
        *(_number(_mean([_metric(task, name) for task in scores.tasks])) for name in shown),
        *(_number(_extra_mean(column, scores)) for column in (extra or {}).values()),
        style="bold",
    )
    return table


def _metric(task: TaskScore, name: str) -> float:
    return task.metrics[name].mean if name in task.metrics else math.nan


def _extra_mean(column: Mapping[str, float], scores: Scores) -> float:
    if "mean" in column and "mean" not in scores.by_task():
        return column["mean"]
    return _mean([column.get(task.task, math.nan) for task in scores.tasks])


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)  # NaN where one is missing


def _number(value: float) -> str:
    return _NONE if math.isnan(value) else f"{value:.2f}"
