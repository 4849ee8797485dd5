"""Generates the splits of the suite and describes its tasks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from random import Random
from typing import Literal

from manylora.data.examples import Example
from manylora.data.suite import people, records, reviews
from manylora.data.suite.rows import SuiteTask
from manylora.errors import DataError

Split = Literal["train", "validation", "test"]

SUITE: dict[str, SuiteTask] = {task.name: task for task in (*reviews.TASKS, *people.TASKS, *records.TASKS)}
"""The eight tasks by name, in table order."""

SUITE_TASKS: tuple[str, ...] = tuple(SUITE)
"""Their names."""

SPLIT_SIZES: dict[str, int] = {"train": 300, "validation": 50, "test": 200}
"""Rows per task, as FLAN-8 has them."""


@lru_cache(maxsize=4)
def _generate(seed: int) -> dict[str, dict[str, tuple[Example, ...]]]:
    """All splits of one seed: split to task to rows. One set of keys keeps contents apart everywhere."""
    seen: set[Hashable] = set()
    splits: dict[str, dict[str, tuple[Example, ...]]] = {}
    for split, size in SPLIT_SIZES.items():
        splits[split] = {}
        for name, task in SUITE.items():
            rng = Random(f"manylora-suite/{seed}/{split}/{name}")
            rows: list[Example] = []
            while len(rows) < size:
                row = task.draw(rng, len(rows))
                if row.key in seen:
                    continue
                seen.add(row.key)
                rows.append(
                    Example(
                        task=name,
                        instruction=row.instruction,
                        input=row.input,
                        output=row.output,
                        origin=f"suite/{split}/{name}:{len(rows) + 1}",
                    )
                )
            rng.shuffle(rows)
            splits[split][name] = tuple(rows)
    return splits


def load_suite(split: Split, tasks: Sequence[str] | None = None, seed: int = 0) -> dict[str, list[Example]]:
    """Rows of one split of the suite.

    Args:
        split: "train" (300 rows a task), "validation" (50) or "test" (200).
        tasks: names to load, in this order; all eight by default.
        seed: another seed is another draw of all three splits.

    Returns:
        Task name to its rows; the same call always returns the same rows.

    Raises:
        DataError: for an unknown split or task name.
    """
    if split not in SPLIT_SIZES:
        raise DataError(f"the suite has no split {split!r}; it has {', '.join(SPLIT_SIZES)}.")
    names = SUITE_TASKS if tasks is None else tuple(tasks)
    unknown = [name for name in names if name not in SUITE]
    if unknown:
        raise DataError(f"the suite has no task {unknown[0]!r}; its tasks are {', '.join(SUITE_TASKS)}.")
    rows = _generate(seed)[split]
    return {name: list(rows[name]) for name in names}
