"""Which rows a limit keeps: a seeded sample, alike over answers, the same in every verb."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from manylora.data.examples import Example
from manylora.data.notes import listed

SEED = 0
"""Of every sample. It is not a run's seed: all seeds of a study must be scored on the same test rows, and `evaluate`
must find those of the run."""


def sample_rows(rows: Sequence[Example], limit: int | None, *, task: str) -> list[Example]:
    """At most `limit` of the rows, in their order, each answer with about its share of them.

    Files are often sorted by answer, so the first rows of one would be all "yes". Every row gets a place between 0 and
    1: those of one answer, shuffled, spread evenly over it with jitter; the lowest places are kept. So an answer with a
    share p of the rows gets p · limit of them, give or take one, free text is sampled plainly, and a smaller limit
    keeps some of what a larger one keeps. The choice depends on the rows and `task` alone.

    Args:
        rows: of one task.
        limit: most rows to keep; None keeps all.
        task: the task's name.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    draw = random.Random(f"{SEED}:sample:{task}")
    by_answer: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_answer.setdefault(row.answer_key, []).append(number)
    places: list[tuple[float, int]] = []
    for numbers in by_answer.values():
        draw.shuffle(numbers)
        places += [((k + draw.random()) / len(numbers), number) for k, number in enumerate(numbers)]
    kept = {number for _, number in sorted(places)[:limit]}
    return [row for number, row in enumerate(rows) if number in kept]


def sample_tasks(data: Mapping[str, Sequence[Example]], limit: int | None) -> dict[str, list[Example]]:
    """`sample_rows` of every task."""
    return {task: sample_rows(rows, limit, task=task) for task, rows in data.items()}


def missing_tasks(known: Iterable[str], test: Mapping[str, object]) -> list[str]:
    """A sentence on the tasks that were trained and have no test rows while others have; none where all have."""
    missing = [task for task in known if task not in test] if test else []
    return [f"no test rows for the tasks {listed(missing)}"] if missing else []


def single_answers(data: Mapping[str, Sequence[Example]], *, what: str) -> list[str]:
    """A sentence for each task of which all rows have one answer: a model that always gives it scores 100.

    Args:
        data: rows by task.
        what: which rows these are, such as "training".
    """
    found = []
    for task, rows in data.items():
        answers = {row.answer_key for row in rows}
        if len(rows) > 1 and len(answers) == 1:
            answer = answers.pop()
            shown = answer if len(answer) <= 40 else answer[:39] + "…"
            found.append(f"all {len(rows):,} {what} rows of task {task} have one answer, {shown!r}")
    return found
