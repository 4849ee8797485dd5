"""Statistics of scores and of comparisons: standard errors, Δm%, intervals over seeds, paired tests, a bootstrap.

Two sources of chance stand behind a difference of two methods: the seed of a training, and which test rows were
drawn. The t interval over seeds sees the first alone, because all seeds are scored on the same rows; the bootstrap
sees both. A claim must hold in both readings.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from manylora.errors import DataError

if TYPE_CHECKING:
    import numpy as np

DRAWS = 4000
"""Bootstrap samples. The 2.5 % point of 4000 draws has a standard error of about 1/14 of the spread."""

LEVEL = 0.95
ALPHA, POWER = 0.05, 0.8
"""Two-sided error and power of the smallest detectable difference, as usual (Cohen 1988)."""


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of `values`: s / sqrt(n), with s the sample deviation (ddof = 1).

    Not a number for fewer than two values: one value says nothing about spread.
    """
    n = len(values)
    if n < 2:
        return math.nan
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def delta_m(
    scores: Mapping[str, float], single: Mapping[str, float], *, lower_is_better: Collection[str] = ()
) -> float:
    """Δm%, the mean relative loss against single-task training, in per cent (arXiv 2509.25414, section 5).

    −100 · mean over tasks of (M_task − M_single) / M_single. Lower is better; negative beats single-task
    training.

    Args:
        scores: each task's score under the method.
        single: each task's score of one LoRA of the same rank that was trained on that task alone.
        lower_is_better: tasks whose score is a cost, such as perplexity; their sign is flipped.

    Raises:
        DataError: the two name different tasks or none, or a single-task score is 0.
    """
    if set(scores) != set(single):
        raise DataError(
            f"The tasks {sorted(set(scores) ^ set(single))} stand on one side only. "
            "Give the same tasks as scores and as single-task scores."
        )
    if not scores:
        raise DataError("There is no task to compare. Give at least one task's score.")
    unknown = sorted(set(lower_is_better) - set(scores))
    if unknown:
        raise DataError(
            f"lower_is_better names {unknown}, which have no score. Known tasks: {sorted(scores)}."
        )
    zero = sorted(task for task, score in single.items() if score == 0)
    if zero:
        raise DataError(
            f"The single-task scores of {zero} are 0, so no relative change exists. Leave them out."
        )
    changes = (
        (score - single[task]) / single[task] * (-1.0 if task in lower_is_better else 1.0)
        for task, score in scores.items()
    )
    return -100.0 * math.fsum(changes) / len(scores)


class Interval(NamedTuple):
    """A mean with its interval; NaN bounds where one value says nothing about spread."""

    mean: float
    low: float
    high: float
    n: int


class PairedTest(NamedTuple):
    """Student's paired t test, two-sided."""

    difference: float
    """Mean of first minus second."""
    low: float
    high: float
    p: float
    n: int


def mean_interval(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Mean ± t · s / sqrt(n), the two-sided Student interval over independent values such as seeds.

    Raises:
        DataError: there is no value.
    """
    from scipy.special import stdtrit

    n = len(values)
    if n == 0:
        raise DataError("There is no value to average. Give at least one.")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * _deviation(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_t(first: Sequence[float], second: Sequence[float], *, level: float = LEVEL) -> PairedTest:
    """Whether two methods differ, from the scores of the same seeds.

    p is NaN for fewer than two pairs; where all differences are equal, 1 if they are 0, else 0.

    Raises:
        DataError: not one value each per seed.
    """
    from scipy.special import stdtr

    differences = _differences(first, second)
    interval = mean_interval(differences, level=level)
    n, spread = len(differences), _deviation(differences)
    if n < 2:
        p = math.nan
    elif spread == 0:
        p = 1.0 if interval.mean == 0 else 0.0
    else:
        p = 2 * float(stdtr(n - 1, -abs(interval.mean) / (spread / math.sqrt(n))))
    return PairedTest(interval.mean, interval.low, interval.high, p, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, in their order (Holm 1979): rejecting those below α keeps the chance of
    any false rejection below α. NaN stays, and does not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


def smallest_detectable(deviation: float, n: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The true difference that a two-sided paired t test over n pairs finds with this power.

    Solves power = P(T' > t) for the noncentral T' with n − 1 degrees of freedom and noncentrality
    difference · sqrt(n) / deviation. NaN for fewer than two pairs.

    Args:
        deviation: sample deviation of the paired differences (ddof = 1).
        n: number of pairs.
        alpha: two-sided error.
        power: chance to find it.
    """
    from scipy.special import nctdtr, stdtrit

    if n < 2:
        return math.nan
    critical = float(stdtrit(n - 1, 1 - alpha / 2))

    def found(noncentrality: float) -> float:
        # The tail on the wrong side is below 1e-5 at any power worth asking for, and scipy's is NaN far out.
        return float(1 - nctdtr(n - 1, noncentrality, critical))

    low, high = 0.0, 1.0
    while found(high) < power:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < power else (low, middle)
    return high * deviation / math.sqrt(n)


Examples = Mapping[str, Sequence[Sequence[float]]]
"""Task to its examples' scores, (seeds, examples)."""


def bootstrap_means(examples: Examples, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap samples, (draws,), of the mean over tasks of the mean over seeds and examples.

    Each draw takes seeds and, within every task, examples with replacement. Where all seeds have the same number of
    examples of a task these are the same rows, so one draw of rows serves all seeds (a crossed design; Owen 2007);
    else each seed's rows are drawn on their own. Drawing n seeds of n understates the variance between them by
    (n − 1) / n, much for few seeds, so deviations between seeds are stretched by sqrt(n / (n − 1)).

    Args:
        examples: per-example scores, or paired differences of two methods.
        draws: number of samples.
        seed: of the random numbers.

    Raises:
        DataError: there is no task, or tasks differ in their number of seeds.
    """
    import numpy as np

    counts = {len(rows) for rows in examples.values()}
    if len(counts) != 1 or 0 in counts or any(len(row) == 0 for rows in examples.values() for row in rows):
        raise DataError(
            f"The tasks {list(examples)} have {sorted(counts)} seeds. Give every task the same seeds, with examples."
        )
    n = counts.pop()
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(n, [1 / n] * n, size=draws) / n  # (draws, seeds)
    total = np.zeros((draws, n))
    for rows in examples.values():
        total += _resampled_means(rows, draws, generator)
    means = total / len(examples)  # (draws, seeds), with the draw's examples
    centre = means.mean(axis=1)
    drawn = (weights * means).sum(axis=1)
    stretch = math.sqrt(n / (n - 1)) if n > 1 else 1.0
    return centre + stretch * (drawn - centre)


def _resampled_means(rows: Sequence[Sequence[float]], draws: int, generator: Any) -> np.ndarray:
    """Each seed's mean over resampled examples, (draws, seeds)."""
    import numpy as np

    if len({len(row) for row in rows}) == 1:
        values = np.asarray(rows, dtype=np.float64)  # (seeds, examples)
        size = values.shape[1]
        counts = generator.multinomial(size, [1 / size] * size, size=draws)
        return counts @ values.T / size
    columns = []
    for row in rows:
        own = np.asarray(row, dtype=np.float64)
        columns.append(
            generator.multinomial(len(own), [1 / len(own)] * len(own), size=draws) @ own / len(own)
        )
    return np.stack(columns, axis=1)


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    if len(first) != len(second):
        raise DataError(
            f"There are {len(first)} scores on one side and {len(second)} on the other. Give one of each per seed."
        )
    return [a - b for a, b in zip(first, second, strict=True)]


def _deviation(values: Sequence[float]) -> float:
    """Sample deviation (ddof = 1); 0 for one value."""
    if len(values) < 2:
        return 0.0
    if min(values) == max(values):
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
