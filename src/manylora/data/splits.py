"""Training, validation and test rows of a run, from whatever the user named."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from manylora.data.examples import Example, TaskData
from manylora.data.notes import DataNotes
from manylora.data.prompts import prompt_text
from manylora.data.sampling import missing_tasks, single_answers
from manylora.data.sources import available_splits, load_examples
from manylora.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The rows of a run. A task may be missing in `validation` or `test`; no list is empty."""

    train: dict[str, list[Example]]
    validation: dict[str, list[Example]]
    test: dict[str, list[Example]]
    leaks: int = 0
    """Test rows whose prompt also stands in `train` or `validation`."""
    dropped: int = 0
    """Training and validation rows left out: their answer text is empty, they have a gold label alone."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a reader of the plan should know of the rows: files and columns that are not used, tasks without test rows,
    splits with one answer."""

    def rows(self) -> Iterator[Example]:
        """All rows, one part after the other."""
        for part in (self.train, self.validation, self.test):
            for examples in part.values():
                yield from examples


def load_splits(
    *,
    data: str | Path,
    test: str | Path | None = None,
    validation: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    task_column: str | None = None,
    seed: int = 0,
    validation_fraction: float = 0.1,
    limit: int | None = None,
) -> Splits:
    """Load all rows of a run.

    Args:
        data: source of the training rows (see `load_examples`), and of the other two where it has them as
            splits.
        test: source of the test rows. Default: the test split of `data`; without one there are none.
        validation: source of the validation rows. Default: the validation split of `data`; without one it is
            cut from the training rows (`cut_validation`).
        tasks: the tasks to train on. Default: all. Of validation and test rows, those of these tasks are
            kept.
        task_column: see `load_examples`.
        seed: of the validation cut. It does not change the embedded suite.
        validation_fraction: share of each task's training rows that a cut takes; 0 cuts none.
        limit: the most rows per task and source, a sample (`sample_rows`) that is taken before the cut. Default: all.

    Raises:
        DataError: see `load_examples`; also where a task has no training row with an answer.
        ConfigError: a setting cannot be.
    """
    notes = DataNotes()

    def load(source: str | Path, split: str, only: Sequence[str] | None = None) -> dict[str, list[Example]]:
        return load_examples(
            source, task_column=task_column, tasks=only, split=split, limit=limit, notes=notes
        )

    def load_side(source: str | Path, split: str) -> dict[str, list[Example]]:
        found = load(source, split)
        kept = {task: found[task] for task in tasks or found if task in found}
        if not kept:
            raise DataError(
                f"The {split} rows of {source} are of none of the tasks {', '.join(tasks or ())}. "
                f"Theirs: {', '.join(found)}."
            )
        return kept

    train = load(data, "train", tasks)
    train, dropped = _trainable(train)
    there = available_splits(data) if test is None or validation is None else ()
    if validation is not None or "validation" in there:
        held_out, dropped_too = _trainable(
            load_side(data if validation is None else validation, "validation")
        )
        dropped += dropped_too
    else:
        train, held_out = cut_validation(train, fraction=validation_fraction, seed=seed)
        notes.others += _large_cuts(train, held_out, fraction=validation_fraction)
    tested: dict[str, list[Example]] = {}
    if test is not None or "test" in there:
        tested = load_side(data if test is None else test, "test")
    return Splits(
        train=train,
        validation=held_out,
        test=tested,
        leaks=_count_leaks(tested, train, held_out),
        dropped=dropped,
        notes=(*notes.lines(), *_gaps(train, held_out, tested)),
    )


def _large_cuts(train: TaskData, held_out: TaskData, *, fraction: float) -> list[str]:
    """A sentence for each task whose cut took far more than was asked for, as its rows have few prompts."""
    found = []
    for task, rows in held_out.items():
        whole = len(rows) + len(train[task])
        if len(rows) > max(1, 2 * fraction * whole):
            found.append(
                f"validation took {len(rows):,} of the {whole:,} rows of task {task}: rows of one prompt stay together"
            )
    return found


def _gaps(train: TaskData, held_out: TaskData, tested: TaskData) -> list[str]:
    """Sentences on tasks that are not tested while others are, and on splits with one answer."""
    found = missing_tasks(train, tested)
    for what, rows in (("training", train), ("validation", held_out), ("test", tested)):
        found += single_answers(rows, what=what)
    return found


def cut_validation(
    data: TaskData, *, fraction: float = 0.1, per_task_max: int = 50, seed: int
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Cut validation rows from the training rows of each task.

    A task of n rows gives about `fraction` · n of them, at least one where n ≥ 2 and at most `per_task_max`;
    a task of one row gives none. Rows of one prompt stay on one side, unless the task has no other. Which
    rows are cut depends on the task's own rows, its name and `seed` alone. Both sides keep the order of the
    rows.

    Returns:
        (train, validation); a task that gives no row is missing in validation.

    Raises:
        ConfigError: `fraction` is outside [0, 1) or `per_task_max` below 0.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"Validation fraction {fraction} must be at least 0 and below 1.")
    if per_task_max < 0:
        raise ConfigError(f"per_task_max {per_task_max} must be 0 or more.")
    train: dict[str, list[Example]] = {}
    validation: dict[str, list[Example]] = {}
    for task, rows in data.items():
        wanted = min(per_task_max, max(1, round(fraction * len(rows)))) if fraction else 0
        cut = _choose(rows, wanted, random.Random(f"{seed}:validation:{task}")) if len(rows) > 1 else set()
        train[task] = [row for i, row in enumerate(rows) if i not in cut]
        if cut:
            validation[task] = [row for i, row in enumerate(rows) if i in cut]
    return train, validation


def _choose(rows: Sequence[Example], wanted: int, generator: random.Random) -> set[int]:
    """Positions of up to `wanted` rows: whole groups of one prompt, in random order, as far as they fit."""
    if wanted < 1:
        return set()
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(prompt_text(row), []).append(i)
    if len(groups) == 1:
        return set(generator.sample(range(len(rows)), min(wanted, len(rows) - 1)))
    order = list(groups.values())
    generator.shuffle(order)
    chosen: set[int] = set()
    for group in order[:-1]:  # never all of them
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if not chosen:  # no group was small enough
        order.sort(key=len)
        chosen.update(order[0])
    return chosen


def _trainable(data: TaskData) -> tuple[dict[str, list[Example]], int]:
    """The rows that have an answer to learn, and how many have none."""
    kept = {task: [row for row in rows if row.has_answer] for task, rows in data.items()}
    for task, rows in kept.items():
        if not rows:
            raise DataError(
                f"Task {task!r} has no row with an answer to train on. Fill in its output or leave it out."
            )
    return kept, sum(map(len, data.values())) - sum(map(len, kept.values()))


def _count_leaks(test: TaskData, *seen: TaskData) -> int:
    prompts = {prompt_text(row) for data in seen for rows in data.values() for row in rows}
    return sum(prompt_text(row) in prompts for rows in test.values() for row in rows)
