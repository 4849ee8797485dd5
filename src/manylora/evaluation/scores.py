"""Scores of tasks: records that are kept and read back, what training changed, and the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, model_validator

from manylora.evaluation.metrics import ACCURACY, EXACT_MATCH, METRICS, metric_label
from manylora.files import NanFloat, Record, Several, json_text, read_record, write_json, write_text
from manylora.table import Column, Table, Value

Baselines = dict[str, dict[str, float]]
"""What something simpler reaches: its name → task → score."""
_FIELDS = ("task", "index", "origin", "prompt", "prediction", "reference", "answer")
"""What a line of predictions.jsonl has beside its metrics."""


class _Estimated(Record):
    """What a page may draw with less, but nothing else: a standard error that is gone is no standard error of NaN."""

    @model_validator(mode="after")
    def _refuse_missing(self, info: ValidationInfo) -> _Estimated:
        own = {"standard_error", "metrics"} & type(self).model_fields.keys()
        if info.context is None and (missing := sorted(own - self.model_fields_set)):
            raise ValueError(f"{missing[0]} is missing")
        return self


class Estimate(_Estimated):
    """A mean over examples."""

    mean: float
    standard_error: NanFloat = math.nan
    """NaN for one example."""
    n: int


class ScoredExample(Record):
    """One prediction beside what it was scored against: a line of predictions.jsonl, metrics beside the fields."""

    task: str
    index: int = 0
    """Position of the example in its task."""
    origin: str = ""
    prompt: str = ""
    prediction: str = ""
    reference: str = ""
    """The text that ROUGE-1 and exact match compare with: the output, or the answer where that is empty."""
    answer: str | None = None
    """Gold label, where the row has one."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Metric name to this example's value, 0 to 100."""

    def to_row(self) -> dict[str, Any]:
        """The line."""
        return {**self.model_dump(exclude={"metrics"}), **self.metrics}

    @model_validator(mode="before")
    @classmethod
    def _from_row(cls, row: Any) -> Any:
        """Metrics stand beside the fields in a line."""
        if not isinstance(row, dict) or "metrics" in row:
            return row
        own = {name: row[name] for name in _FIELDS if name in row}
        return {**own, "metrics": {name: value for name, value in row.items() if name not in own}}


class TaskScore(_Estimated):
    """One task's score: the mean of its main metric over its examples, 0 to 100."""

    task: str
    metric: str
    """The main one: accuracy where the rows have labels that an answer rule reads, else ROUGE-1, of whichever words."""
    score: float
    standard_error: NanFloat = math.nan
    """Of the mean over the examples, sd / sqrt(n) with ddof = 1; NaN where n is 1."""
    n: int
    metrics: dict[str, Estimate] = Field(default_factory=dict)
    """Every metric measured, the main one included."""
    examples: Several[ScoredExample] = Field(default=(), exclude=True, repr=False)
    """The rows behind the score, in the order of the data; empty in a score that was read back."""

    def value_of(self, metric: str) -> float:
        """The mean of a metric; NaN where it was not measured."""
        return self.metrics[metric].mean if metric in self.metrics else math.nan


class Scores(Record):
    """The scores of several tasks."""

    tasks: Several[TaskScore] = Field(min_length=1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mean {self.mean:.1f} of {len(self.tasks)} tasks, {self.n:,} rows)"

    def _repr_html_(self) -> str:
        return scores_table(self, title=repr(self))._repr_html_()

    def __getitem__(self, task: str) -> TaskScore:
        """The score of a task."""
        for found in self.tasks:
            if found.task == task:
                return found
        raise KeyError(f"{task!r} was not scored; the tasks are {', '.join(self.by_task())}")

    @property
    def mean(self) -> float:
        """Mean over tasks of their main scores; every task counts alike."""
        return math.fsum(task.score for task in self.tasks) / len(self.tasks)

    @property
    def standard_error(self) -> float:
        """Standard error of `mean` from the sampling of test examples: sqrt(Σ se²) / number of tasks.

        It holds the tasks and the trained model fixed, so it says nothing about seeds.
        """
        return math.sqrt(math.fsum(task.standard_error**2 for task in self.tasks)) / len(self.tasks)

    @property
    def n(self) -> int:
        """Examples of all tasks together."""
        return sum(task.n for task in self.tasks)

    @property
    def metric_label(self) -> str:
        """The main metric of all tasks, as tables call it; empty where they differ."""
        names = {task.metric for task in self.tasks}
        return metric_label(names.pop()) if len(names) == 1 else ""

    def by_task(self) -> dict[str, float]:
        """Task to its main score."""
        return {task.task: task.score for task in self.tasks}

    def other_metrics(self) -> dict[str, dict[str, float]]:
        """Each metric that is not the main one of all tasks: task to its mean, where it was measured."""
        names = dict.fromkeys(name for task in self.tasks for name in task.metrics)
        found = {
            name: {task.task: task.metrics[name].mean for task in self.tasks if name in task.metrics}
            for name in names
        }
        return {name: means for name, means in found.items() if any(t.metric != name for t in self.tasks)}

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values, without the examples."""
        return {
            "mean": self.mean,
            "standard_error": None if math.isnan(self.standard_error) else self.standard_error,
            "n": self.n,
            "tasks": self.to_rows(),
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row per task."""
        return [task.model_dump() for task in self.tasks]

    def prediction_rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row per example, the lines of `predictions.jsonl`."""
        return [example.to_row() for task in self.tasks for example in task.examples]


class Gain(Record):
    """What training changed of one task, against the bare base on the same rows and prompts; all 0 to 100."""

    before: float
    """The base's main score."""
    became_right: float
    """Percentage of the rows that the base answered wrongly and the adapter answers rightly."""
    became_wrong: float
    """The reverse."""
    right: float
    """Percentage of the rows that are right now."""


Gains = Mapping[str, Gain]
"""Task to what training changed of it; empty where the base was not scored."""


class SavedScores(Scores):
    """A run's scores.json."""

    gains: dict[str, Gain] = Field(default_factory=dict)
    """Task to what training changed of it; empty where the base was not scored (train --score-base)."""
    baselines: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Of what needs no model: name to task to score."""
    notes: Several[str] = ()
    """What is to be said of the scores."""


class ClientScores(Record):
    """A federated run's scores.json: each client's personal model, and the one it would have on its own."""

    clients: dict[str, Scores]
    reference: dict[str, Scores] = Field(default_factory=dict)


def write_scores(
    folder: Path,
    scores: Scores,
    baselines: Mapping[str, Mapping[str, float]],
    notes: Sequence[str] = (),
    gains: Gains | None = None,
) -> None:
    """Write predictions.jsonl and then scores.json, with what is to be said of the scores."""
    lines = (json_text(row) + "\n" for row in scores.prediction_rows())
    write_text(folder / "predictions.jsonl", "".join(lines))
    saved = {**scores.to_dict(), "baselines": baselines, "notes": list(notes)}
    if gains:
        saved["gains"] = {task: gain.model_dump() for task, gain in gains.items()}
    write_json(folder / "scores.json", saved)


def read_scores(folder: Path) -> SavedScores:
    """A run's scores.json.

    Raises:
        RunError: it is missing or damaged.
    """
    remedy = "put a copy of it back, or score the adapter again with manylora evaluate"
    return read_record(folder / "scores.json", SavedScores, remedy=remedy)


def read_client_scores(folder: Path) -> ClientScores:
    """A federated run's scores.json.

    Raises:
        RunError: it is missing or damaged.
    """
    return read_record(folder / "scores.json", ClientScores, remedy="put a copy of it back")


def gains_of(before: Scores, after: Scores) -> dict[str, Gain]:
    """What training changed of each task, row by row.

    A row is right where its label is, by the task's answer rule, else where the text is the reference's (exact match).

    Args:
        before: of the bare base.
        after: of the adapter, on the same rows.
    """
    found = {}
    for old, new in zip(before.tasks, after.tasks, strict=True):
        rows = [
            (_is_right(one), _is_right(other)) for one, other in zip(old.examples, new.examples, strict=True)
        ]
        found[new.task] = Gain(
            before=old.score,
            became_right=100 * sum(not was and now for was, now in rows) / len(rows),
            became_wrong=100 * sum(was and not now for was, now in rows) / len(rows),
            right=100 * sum(now for _, now in rows) / len(rows),
        )
    return found


def gains_line(gains: Gains, scores: Scores) -> str:
    """One sentence on all rows together; empty without gains."""
    if not gains:
        return ""
    rows = {task.task: task.n for task in scores.tasks}

    def count(part: Callable[[Gain], float]) -> int:
        return round(sum(part(gain) * rows[task] / 100 for task, gain in gains.items()))

    now = count(lambda gain: gain.right)
    right, wrong = count(lambda gain: gain.became_right), count(lambda gain: gain.became_wrong)
    return (
        f"Of {scores.n:,} test rows the model answered {now - right + wrong:,} rightly before this training and "
        f"{now:,} after it: {right:,} became right, {wrong:,} became wrong."
    )


def _is_right(row: ScoredExample) -> bool:
    return row.metrics.get(ACCURACY, row.metrics.get(EXACT_MATCH, 0.0)) == 100.0


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


def _mean_of(values: Mapping[str, float], scores: Scores) -> float:
    if "mean" in values and "mean" not in scores.by_task():
        return values["mean"]
    return math.fsum(values.get(task.task, math.nan) for task in scores.tasks) / len(scores.tasks)
