"""Tasks that were not learnt: scores that something without a model reaches too, and what to do about them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from manylora.data import TaskData, Words
from manylora.evaluation.score import score_task
from manylora.evaluation.scores import Scores

CONSTANT = "one answer for all rows"
Z_95 = 1.96
"""Standard errors that a score must stand above the best of what needs no model; two-sided 95 % of the normal."""

_REASONS = "Tasks with like prompts and contrary answers get in each other's way; so does a training that is too short."


def constant_scores(
    test: TaskData, train: TaskData | None = None, *, rouge: Words = "all"
) -> dict[str, float]:
    """Task to the score of its most frequent answer, given to every row.

    Args:
        test: rows to score.
        train: rows to take the answer from. Default: the scored ones, of which no constant answer gets more right.
        rouge: which words ROUGE-1 counts.
    """
    found = {}
    for task, rows in test.items():
        source = (train or {}).get(task) or rows
        answer, _ = Counter(row.output or row.answer or "" for row in source).most_common(1)[0]
        found[task] = score_task(task, rows, [answer] * len(rows), rouge=rouge).score
    return found


def unlearnt(scores: Scores, baselines: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[str, float]]:
    """The tasks that are not clearly above the best baseline, each with that baseline's name and score.

    Clearly: by more than `Z_95` standard errors of the task's score over its test rows.
    """
    found = {}
    for task in scores.tasks:
        known = {name: values[task.task] for name, values in baselines.items() if task.task in values}
        if not known:
            continue
        best = max(known, key=lambda name: known[name])
        error = 0.0 if math.isnan(task.standard_error) else task.standard_error
        if task.score <= known[best] + Z_95 * error:
            found[task.task] = (best, known[best])
    return found


def chance_notes(
    scores: Scores, baselines: Mapping[str, Mapping[str, float]], *, router: str | None = None
) -> list[str]:
    """What to say under a table of scores; nothing where all tasks were learnt.

    Args:
        scores: of a trained adapter.
        baselines: name to task to score, of what needs no model.
        router: the adapter's.
    """
    found = unlearnt(scores, baselines)
    if not found:
        return []
    values = scores.by_task()
    listed = ", ".join(
        f"{task} ({values[task]:.1f}; {name} {best:.1f})" for task, (name, best) in found.items()
    )
    apart = (
        "give each task an expert of its own (--router task), "
        if router != "task" and len(values) > 1
        else ""
    )
    return [
        f"Not learnt, as far as these rows can tell: {listed}. {_REASONS} To mend it, {apart}train longer (--epochs), "
        "or train such a task alone (--tasks)."
    ]
