"""Intervals, paired tests, the bootstrap and the verdicts: against scipy, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manylora.errors import DataError
from manylora.evaluation.claims import ClaimKind, Trial, try_claims
from manylora.evaluation.statistics import (
    bootstrap_means,
    holm,
    mean_interval,
    paired_t,
    smallest_detectable,
)

scores = st.lists(st.floats(0, 100), min_size=2, max_size=8)


@settings(deadline=None)
@given(scores, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_mean_interval_is_students(values: list[float], level: float) -> None:
    assume(max(values) - min(values) > 1e-3)
    interval = mean_interval(values, level=level)
    low, high = scipy.stats.t.interval(
        level, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values)
    )
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert interval.mean == pytest.approx(np.mean(values))


def test_mean_interval_of_two_values_in_closed_form() -> None:
    # with one degree of freedom t is Cauchy: its 97.5 % point is tan(0.475 π)
    interval = mean_interval([10.0, 20.0])
    assert interval.high - interval.mean == pytest.approx(5 * math.tan(0.475 * math.pi))


def test_one_seed_has_a_mean_and_no_interval() -> None:
    interval = mean_interval([3.0])
    assert interval.mean == 3.0
    assert interval.n == 1
    assert math.isnan(interval.low)
    with pytest.raises(DataError, match="no value"):
        mean_interval([])


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=8))
def test_paired_t_is_scipys(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    differences = np.subtract(first, second)
    assume(np.ptp(differences) > 1e-3)
    test, expected = paired_t(first, second), scipy.stats.ttest_rel(first, second)
    assert test.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    interval = expected.confidence_interval(0.95)
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-6)


def test_paired_t_where_nothing_varies() -> None:
    assert paired_t([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired_t([2.0, 3.0], [1.0, 2.0]).p == 0.0
    assert math.isnan(paired_t([2.0], [1.0]).p)
    with pytest.raises(DataError, match="2 scores on one side and 1"):
        paired_t([1.0, 2.0], [1.0])


def test_holm_by_hand() -> None:
    # sorted 0.005·4, 0.01·3, 0.03·2, 0.04·1, and never below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_leaves_out_what_has_no_p() -> None:
    adjusted = holm([0.01, math.nan, 0.02])
    assert [adjusted[0], adjusted[2]] == pytest.approx([0.02, 0.02])
    assert math.isnan(adjusted[1])


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_none_and_bonferroni(p_values: list[float]) -> None:
    for p, adjusted in zip(p_values, holm(p_values), strict=True):
        assert p <= adjusted <= min(1.0, len(p_values) * p) + 1e-12


@pytest.mark.parametrize("n", [2, 3, 5, 10, 34])
def test_the_smallest_detectable_difference_is_found_with_the_power_named(n: int) -> None:
    difference = smallest_detectable(2.5, n)
    noncentrality = difference * math.sqrt(n) / 2.5
    power = scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, n - 1), n - 1, noncentrality)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_the_smallest_detectable_difference_by_simulation() -> None:
    generator = np.random.default_rng(0)
    difference = smallest_detectable(1.0, 5)
    samples = generator.normal(difference, 1.0, size=(20_000, 5))
    found = scipy.stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.012)  # four standard errors
    assert math.isnan(smallest_detectable(1.0, 1))


def test_the_t_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    samples = generator.normal(7.0, 3.0, size=(4000, 5))
    covered = [interval.low <= 7.0 <= interval.high for interval in map(mean_interval, samples.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.014)


def simulated(
    generator: np.random.Generator, *, seeds: float, rows: float, noise: float
) -> dict[str, np.ndarray]:
    """Paired differences whose true mean is 0: an effect of each seed, of each test row, and of both together."""
    of_seed = generator.normal(0, seeds, size=(5, 1))
    return {
        task: of_seed + generator.normal(0, rows, size=(1, 60)) + generator.normal(0, noise, size=(5, 60))
        for task in ("a", "b")
    }


@pytest.mark.parametrize(
    ("seeds", "rows", "noise", "share"),
    [(1.0, 10.0, 5.0, 0.94), (0.0, 10.0, 5.0, 0.95), (1.0, 0.0, 5.0, 0.95), (1.0, 0.0, 0.0, 0.88)],
)
def test_the_bootstrap_covers_seeds_and_rows_together(
    seeds: float, rows: float, noise: float, share: float
) -> None:
    # With no chance but that of five seeds it covers 88 %, as a normal interval does with four degrees of freedom.
    generator = np.random.default_rng(2)
    covered = []
    for number in range(250):
        data = simulated(generator, seeds=seeds, rows=rows, noise=noise)
        draws = bootstrap_means(
            {task: values.tolist() for task, values in data.items()}, draws=400, seed=number
        )
        low, high = np.quantile(draws, [0.025, 0.975])
        covered.append(low <= 0 <= high)
    assert np.mean(covered) == pytest.approx(share, abs=0.05)  # three standard errors of 300 or so


def test_the_interval_over_seeds_alone_misses_the_chance_of_the_rows() -> None:
    # why both are printed: all seeds are scored on the same rows
    generator = np.random.default_rng(3)
    covered = []
    for _ in range(300):
        data = simulated(generator, seeds=0.2, rows=10.0, noise=2.0)
        interval = mean_interval(np.mean([rows.mean(1) for rows in data.values()], 0).tolist())
        covered.append(interval.low <= 0 <= interval.high)
    assert np.mean(covered) < 0.6


def test_the_bootstrap_of_rows_that_never_vary_is_the_spread_of_seeds() -> None:
    # 3 seeds, whose means are 0, 3 and 6: the variance of a mean of 3 is s² / 3 = 3
    draws = bootstrap_means({"a": [[0.0] * 4, [3.0] * 4, [6.0] * 4]}, draws=40_000)
    assert draws.mean() == pytest.approx(3.0, abs=0.05)
    assert draws.var() == pytest.approx(3.0, rel=0.05)


def test_the_bootstrap_is_a_function_of_its_seed_and_takes_unequal_rows() -> None:
    data = {"a": [[0.0, 100.0, 100.0], [0.0, 100.0]], "b": [[50.0, 60.0], [55.0, 70.0]]}
    first, again, other = (bootstrap_means(data, seed=seed) for seed in (4, 4, 5))
    assert (first == again).all()
    assert (first != other).any()
    with pytest.raises(DataError, match="same seeds"):
        bootstrap_means({"a": [[1.0]], "b": [[1.0], [2.0]]})
    with pytest.raises(DataError, match="same seeds"):
        bootstrap_means({})


def tried(kind: ClaimKind, differences: list[float], *, rows: float = 0.0, margin: float = 1.0) -> Trial:
    """A trial of these differences per seed, whose 200 test rows differ by this deviation."""
    generator = np.random.default_rng(5)
    noise = generator.normal(0, rows, size=200)
    noise -= noise.mean()
    first = [50.0 + difference for difference in differences]
    examples = {"a": [(difference + noise).tolist() for difference in differences]}
    (trial,) = try_claims([kind], [first], [[50.0] * len(first)], [examples], margin=margin)
    return trial


@pytest.mark.parametrize(
    ("kind", "differences", "rows", "verdict"),
    [
        ("better", [2.0, 2.4, 1.8, 2.2, 2.1], 1.0, "supported"),
        ("better", [2.0, 2.4, 1.8, 2.2, 2.1], 40.0, "undecided"),  # the rows could have been others
        ("better", [-2.0, -2.4, -1.8, -2.2, -2.1], 1.0, "not supported"),  # it is worse
        ("better", [0.1, -0.2, 0.0, 0.2, -0.1], 1.0, "not supported"),  # a gain of 1 is excluded
        ("better", [6.0, -5.0, 2.0, 4.0, -3.0], 1.0, "undecided"),
        ("better", [30.0], 1.0, "undecided"),
        ("no worse", [0.1, -0.2, 0.0, 0.2, -0.1], 1.0, "supported"),
        ("no worse", [0.1, -0.2, 0.0, 0.2, -0.1], 40.0, "undecided"),
        ("no worse", [-0.5, -0.6, -0.4, -0.5, -0.5], 1.0, "supported"),  # a loss, but a small one
        ("no worse", [-3.0, -3.2, -2.8, -3.1, -2.9], 1.0, "not supported"),
        ("no worse", [-1.5, -0.5, -1.2, -0.8, -1.0], 1.0, "undecided"),
        ("no worse", [0.0], 1.0, "undecided"),
    ],
)
def test_verdicts(kind: ClaimKind, differences: list[float], rows: float, verdict: str) -> None:
    assert tried(kind, differences, rows=rows).verdict == verdict


def test_a_claim_must_survive_the_number_of_claims() -> None:
    differences = [1.0, 2.0, 0.4, 1.5, 0.9]
    p = paired_t(differences, [0.0] * 5).p
    assert 0.01 < p < 0.05
    alone = try_claims(["better"], [differences], [[0.0] * 5], [None])
    many = try_claims(["better"] * 5, [differences] * 5, [[0.0] * 5] * 5, [None] * 5)
    assert alone[0].verdict == "supported"
    assert {trial.verdict for trial in many} == {"undecided"}
    with_others = try_claims(["better", "no worse"], [differences] * 2, [[0.0] * 5] * 2, [None] * 2)
    assert with_others[0].p_holm == alone[0].p_holm  # non-inferiority is no member of the family


def test_the_detectable_difference_counts_the_rows_too() -> None:
    quiet, noisy = (tried("better", [2.0, 2.4, 1.8, 2.2, 2.1], rows=rows) for rows in (0.0, 40.0))
    assert quiet.detectable == pytest.approx(
        smallest_detectable(np.std([2.0, 2.4, 1.8, 2.2, 2.1], ddof=1), 5)
    )
    # the deviation of a mean over 200 rows, times 1.96 + 0.84
    assert noisy.detectable == pytest.approx(2.8 * 40 / math.sqrt(200), rel=0.15)
