"""In which order a run sees the rows of its tasks.

The whole order is one list, a pure function of its arguments, so that a resumed run goes on exactly where it
stopped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias, get_args

from manylora.errors import ConfigError, DataError

Mixing: TypeAlias = Literal["proportional", "uniform", "temperature"]

MIXINGS: tuple[Mixing, ...] = get_args(Mixing)
"""How tasks can be mixed."""
_MOST_READINGS = 10**8
"""Rows of a plan, over all its epochs: a list of so many takes some GiB and a minute or two."""


def mixture_shares(
    sizes: Mapping[str, int], *, strategy: Mixing, temperature: float = 2.0
) -> dict[str, float]:
    """Each task's share of the training rows; they sum to 1.

    With n_i rows in task i and temperature T the share is proportional to n_i^(1/T): T = 1 is "proportional",
    T → ∞ is "uniform" (Raffel et al. 2020, T5, §3.5.2, here with no artificial limit on n_i). The default
    T = 2 is the mildest of the temperatures studied there (2, 4, 8).

    Raises:
        DataError: there is no task, or a task has no rows.
        ConfigError: `strategy` or `temperature` cannot be.
    """
    if strategy not in MIXINGS:
        raise ConfigError(f"Mixing strategy {strategy!r} is unknown. Choose from {', '.join(MIXINGS)}.")
    if not temperature > 0:
        raise ConfigError(f"Mixing temperature {temperature} must be above 0; 1 is proportional.")
    _check_sizes(sizes)
    exponent = {"proportional": 1.0, "uniform": 0.0, "temperature": 1.0 / temperature}[strategy]
    largest = max(sizes.values())
    weights = {task: (n / largest) ** exponent for task, n in sizes.items()}  # at most 1: no overflow
    total = math.fsum(weights.values())
    return {task: weight / total for task, weight in weights.items()}


def mixture_schedule(
    sizes: Mapping[str, int],
    *,
    epochs: float,
    strategy: Mixing = "proportional",
    temperature: float = 2.0,
    seed: int,
) -> list[int]:
    """The rows of a whole run, in order, as indices into all tasks' rows laid end to end.

    The tasks lie in the order of `sizes` (rows per task): index n_0 is the second task's first row.
    Every strategy gives round(epochs · Σ n_i) rows, at least one.

    - "proportional": each epoch holds every row once, in a fresh shuffle; a last part of an epoch is the
      beginning of one.
    - "uniform", "temperature": task i gets its share (`mixture_shares`) of the run, exact but for rounding
      to whole rows, spread evenly over the run with random jitter. Within a task all rows come once, in a
      fresh shuffle, before any comes again.

    Raises:
        DataError, ConfigError: as `mixture_shares`; also `epochs` not above 0.
    """
    if not 0 < epochs < math.inf:
        raise ConfigError(f"epochs {epochs} must be above 0 and finite.")
    shares = mixture_shares(sizes, strategy=strategy, temperature=temperature)
    rows = sum(sizes.values())
    if epochs * rows > _MOST_READINGS:
        raise ConfigError(
            f"epochs {epochs:g} over {rows:,} rows are {epochs * rows:.0e} readings; at most {_MOST_READINGS:.0e} are "
            "planned at once. Take fewer epochs."
        )
    total = max(1, round(epochs * rows))
    if strategy == "proportional":
        endless = _passes(rows, key=f"{seed}:all rows")
        return [next(endless) for _ in range(total)]
    return _interleave(sizes, _apportion(shares, total), seed=seed)


def _check_sizes(sizes: Mapping[str, int]) -> None:
    if not sizes:
        raise DataError("There is no task to train on. Name data with at least one row.")
    for task, n in sizes.items():
        if n < 1:
            raise DataError(f"Task {task!r} has no rows. Give it some or leave it out.")


def _passes(n: int, *, key: str) -> Iterator[int]:
    """0 … n − 1 in a fresh shuffle, again and again; each pass has its own generator, named by `key`."""
    number = 0
    while True:
        order = list(range(n))
        random.Random(f"{key}:{number}").shuffle(order)
        yield from order
        number += 1


def _apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole counts that sum to `total`, each within one of its exact share (largest remainders)."""
    exact = {task: share * total for task, share in shares.items()}
    counts = {task: math.floor(value) for task, value in exact.items()}
    # The sort is stable: ties go to the earlier task.
    by_remainder = sorted(exact, key=lambda task: counts[task] - exact[task])
    for task in by_remainder[: total - sum(counts.values())]:
        counts[task] += 1
    return counts


def _interleave(sizes: Mapping[str, int], counts: Mapping[str, int], *, seed: int) -> list[int]:
    """`counts[task]` rows of each task: one somewhere in each of that many equal stretches of the run."""
    placed: list[tuple[float, int]] = []
    offset = 0
    for task, n in sizes.items():
        jitter = random.Random(f"{seed}:{task}:places")
        rows = _passes(n, key=f"{seed}:{task}:rows")
        placed.extend(
            ((k + jitter.random()) / counts[task], offset + next(rows)) for k in range(counts[task])
        )
        offset += n
    placed.sort()
    return [index for _, index in placed]
