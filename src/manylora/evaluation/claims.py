"""A claim about two methods, tried on paired scores: supported, not supported, or undecided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from manylora.evaluation.statistics import (
    ALPHA,
    Examples,
    PairedTest,
    bootstrap_means,
    holm,
    paired_t,
    smallest_detectable,
)
from manylora.files import NanFloat, Record

Verdict: TypeAlias = Literal["supported", "not supported", "undecided"]
ClaimKind: TypeAlias = Literal["better", "no worse"]

_NORMAL_975, _NORMAL_80 = 1.959964, 0.841621
_ROUNDING = 1e-9
"""Points; what arithmetic alone makes of equal differences is below it."""


_Bounds = Annotated[tuple[NanFloat, NanFloat], Field(strict=False)]


class Trial(Record):
    """What the data say about a difference, first minus second, in points; NaN is what one seed cannot say."""

    difference: NanFloat = math.nan
    """Mean over seeds."""
    low: NanFloat = math.nan
    """95 % interval over seeds."""
    high: NanFloat = math.nan
    p: NanFloat = math.nan
    """Of the paired t test, two-sided."""
    p_holm: NanFloat = math.nan
    """p, adjusted for all "better" claims of the study."""
    bootstrap: _Bounds = (math.nan, math.nan)
    """95 % interval over seeds and test examples together; NaN without per-example scores."""
    one_sided: _Bounds = (math.nan, math.nan)
    """The wider of both readings' one-sided 95 % bounds: the difference is above the first, below the second."""
    detectable: NanFloat = math.nan
    """Smallest difference that this study would have found in both readings with power 0.8, the t test at α divided
    by the number of "better" claims (what Holm asks of the smallest p); NaN where nothing varied."""
    margin: float | None = None
    """Points that count as nothing."""
    n: int | None = None
    """Seeds."""
    verdict: Verdict = "undecided"


def try_claims(
    kinds: Sequence[ClaimKind],
    firsts: Sequence[Sequence[float]],
    seconds: Sequence[Sequence[float]],
    examples: Sequence[Examples | None],
    *,
    margin: float = 1.0,
) -> list[Trial]:
    """Try every claim of a study; Holm's correction runs over all its "better" claims.

    "better" is supported where the difference is above 0 by the corrected t test and by the bootstrap; not supported
    where it is below 0 by both, or where both readings' one-sided 95 % bounds exclude a gain of `margin`.
    "no worse" (non-inferiority) is supported where both one-sided 95 % bounds exclude a loss of `margin`; not
    supported where both show a loss above it. Everything else is undecided, and so is any study of one seed, and a
    difference that is the same in every seed and row: without spread nothing is known of chance.

    Args:
        kinds: of each claim.
        firsts: of each claim, its first method's score per seed.
        seconds: the second method's scores of the same seeds.
        examples: of each claim, task to paired differences per example, (seeds, examples); None: there are none.
        margin: points that count as nothing.
    """
    tests = [paired_t(first, second) for first, second in zip(firsts, seconds, strict=True)]
    family = [test.p if kind == "better" else math.nan for kind, test in zip(kinds, tests, strict=True)]
    adjusted = holm(family)
    alpha = ALPHA / max(1, sum(not math.isnan(p) for p in family))
    return [
        _trial(kind, test, p_holm, first, second, paired, alpha=alpha, margin=margin)
        for kind, test, p_holm, first, second, paired in zip(
            kinds, tests, adjusted, firsts, seconds, examples, strict=True
        )
    ]


def _trial(
    kind: ClaimKind,
    test: PairedTest,
    p_holm: float,
    first: Sequence[float],
    second: Sequence[float],
    paired: Examples | None,
    *,
    alpha: float,
    margin: float,
) -> Trial:
    import numpy as np

    one = paired_t(first, second, level=0.9)  # its ends are one-sided 95 % bounds
    low, high, floor, ceiling, spread = math.nan, math.nan, one.low, one.high, 0.0
    if paired is not None:
        draws = bootstrap_means(paired)
        low, floor_, ceiling_, high = map(float, np.quantile(draws, [0.025, 0.05, 0.95, 0.975]))
        floor, ceiling, spread = min(floor, floor_), max(ceiling, ceiling_), float(draws.std(ddof=1))
    deviation = math.sqrt(
        math.fsum((a - b - test.difference) ** 2 for a, b in zip(first, second, strict=True))
        / max(1, test.n - 1)
    )
    varied = deviation > _ROUNDING or spread > _ROUNDING
    detectable = math.nan
    verdict: Verdict = "undecided"
    if test.n > 1 and varied:
        over_seeds = smallest_detectable(deviation, test.n, alpha=alpha if kind == "better" else ALPHA)
        detectable = max(over_seeds, (_NORMAL_975 + _NORMAL_80) * spread)
        verdict = (
            _better(test, p_holm, (low, high), ceiling, margin)
            if kind == "better"
            else _no_worse(floor, ceiling, margin)
        )
    return Trial(
        **test._asdict(),
        p_holm=p_holm,
        bootstrap=(low, high),
        one_sided=(floor, ceiling),
        detectable=detectable,
        margin=margin,
        verdict=verdict,
    )


def _better(
    test: PairedTest, p_holm: float, bootstrap: tuple[float, float], ceiling: float, margin: float
) -> Verdict:
    low, high = bootstrap
    significant = p_holm < ALPHA
    if significant and test.difference > 0 and not low <= 0:
        return "supported"
    if (significant and test.difference < 0 and not high >= 0) or ceiling < margin:
        return "not supported"
    return "undecided"


def _no_worse(floor: float, ceiling: float, margin: float) -> Verdict:
    if floor > -margin:
        return "supported"
    return "not supported" if ceiling < -margin else "undecided"
