"""Scores of a classifier: accuracy among each task's labels, and the majority baseline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.data import TaskData, prompt_text
from manylora.errors import DataError
from manylora.evaluation.metrics import ACCURACY
from manylora.evaluation.score import ScoredExample, Scores, sum_examples

if TYPE_CHECKING:
    from manylora.training import LabelSets, TaskFacts


def score_labels(data: TaskData, predictions: Mapping[str, list[str]]) -> Scores:
    """Accuracy per task: 100 for a row whose label is predicted, else 0.

    Args:
        data: task to rows; a row's label is its output, white space normalised.
        predictions: task to labels, in the order of the rows.

    Raises:
        DataError: there is no task, or not one prediction per row.
    """
    if not data:
        raise DataError("There is no task to score. Give rows of at least one task.")
    from manylora.training import label_of

    tasks = []
    for task, rows in data.items():
        found = predictions.get(task, [])
        if len(found) != len(rows):
            raise DataError(
                f"Task {task!r} has {len(rows)} rows but {len(found)} predictions; give one per row."
            )
        examples = tuple(
            ScoredExample(
                task=task,
                index=index,
                prompt=prompt_text(row),
                prediction=label,
                reference=label_of(row),
                answer=None,
                metrics={ACCURACY: 100.0 * (label == label_of(row))},
                origin=row.origin,
            )
            for index, (row, label) in enumerate(zip(rows, found, strict=True))
        )
        tasks.append(sum_examples(task, examples))
    return Scores(tasks=tuple(tasks))


def majority_scores(labels: LabelSets, test: TaskData) -> dict[str, float]:
    """Task to the accuracy of its most frequent training label."""
    constant = {task: [labels.majority[task]] * len(rows) for task, rows in test.items()}
    return score_labels(test, constant).by_task()


def read_labels(facts: TaskFacts, *, source: Path) -> LabelSets:
    """The labels that a run noted in its tasks.json.

    Args:
        facts: what the file says.
        source: its path, for the error.

    Raises:
        DataError: it holds none.
    """
    from manylora.training import LabelSets

    for task, known in facts.tasks.items():
        if not known.labels or known.majority is None:
            raise DataError(f"{source} names no labels of task {task!r}; train the classifier again.")
    return LabelSets(
        tasks={task: list(known.labels or ()) for task, known in facts.tasks.items()},
        majority={task: known.majority or "" for task, known in facts.tasks.items()},
    )
