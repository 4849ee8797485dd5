"""Task weights in the mixing of tasks: one of weight 2 is drawn as if it had twice its rows."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from manylora.data import mixture_schedule, mixture_shares
from manylora.errors import ConfigError

if TYPE_CHECKING:
    from manylora.training.config import TrainConfig

_FINEST = 10_000
"""Rows that the task which counts least is given, where memory allows: shares are then right to a ten-thousandth."""
_MOST = 1_000_000
"""Rows that all tasks together are given at most, or ten times as many as they have: they become a list."""


def weighted_sizes(sizes: Mapping[str, int], weights: Mapping[str, float] | None) -> dict[str, int]:
    """The rows that tasks count as having, all times a common factor where there are weights.

    Args:
        sizes: task to its rows.
        weights: task to its weight; 1 where it has none.

    Raises:
        ConfigError: a weight of a task that is not there.
    """
    if weights is None:
        return dict(sizes)
    if unknown := sorted(weights.keys() - sizes.keys()):
        raise ConfigError(
            f"weights name {unknown[0]!r}, which is no task here; the tasks: {', '.join(sizes)}."
        )
    exact = {task: weights.get(task, 1.0) * rows for task, rows in sizes.items()}
    scale = min(_FINEST / min(exact.values()), max(_MOST, 10 * sum(sizes.values())) / sum(exact.values()))
    return {task: max(1, round(scale * rows)) for task, rows in exact.items()}


def schedule(sizes: Mapping[str, int], config: TrainConfig) -> list[int]:
    """The rows of a whole run in order, as `mixture_schedule` gives them, by the weights of `config`.

    With weights each task gets its share of the run, exact but for rounding and spread evenly, and all its rows come
    once before any comes again.

    Raises:
        DataError, ConfigError: as `mixture_schedule` and `weighted_sizes`.
    """
    assert config.epochs is not None
    if config.task_weights is None:
        return mixture_schedule(
            sizes,
            epochs=config.epochs,
            strategy=config.mixing,
            temperature=config.mixing_temperature,
            seed=config.seed,
        )
    counted = weighted_sizes(sizes, config.task_weights)
    drawn = mixture_schedule(
        counted,
        epochs=config.epochs * sum(sizes.values()) / sum(counted.values()),
        strategy="temperature",  # of 1 it is proportional, with exact shares
        temperature=1.0 if config.mixing == "proportional" else config.mixing_temperature,
        seed=config.seed,
    )
    # What was drawn says which task's turn it is; which of its rows, a schedule of that task alone.
    tasks, ends = list(sizes), list(accumulate(counted.values()))
    turns = [tasks[bisect_right(ends, index)] for index in drawn]
    rows = {
        task: iter(
            mixture_schedule(
                {task: sizes[task]}, epochs=times / sizes[task], strategy="uniform", seed=config.seed
            )
        )
        for task, times in Counter(turns).items()
    }
    starts = dict(zip(tasks, accumulate(sizes.values(), initial=0), strict=False))
    return [starts[task] + next(rows[task]) for task in turns]


def weights_text(sizes: Mapping[str, int], config: TrainConfig) -> str:
    """Weights and what they make of the run, for the plan."""
    shares = mixture_shares(
        weighted_sizes(sizes, config.task_weights),
        strategy=config.mixing,
        temperature=config.mixing_temperature,
    )
    given = ", ".join(f"{task} {weight:g}" for task, weight in (config.task_weights or {}).items())
    parts = ", ".join(f"{task} {100 * share:.1f} %" for task, share in shares.items())
    return f"{given}; of the rows read {parts}"
