"""Standard errors and the relative change against single-task training, against closed forms."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.errors import DataError
from manylora.evaluation import delta_m, standard_error


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_standard_error_is_the_sample_deviation_over_root_n(values: list[float]) -> None:
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert standard_error(values) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("right", "n"), [(1, 4), (50, 200), (0, 7), (7, 7)])
def test_standard_error_of_an_accuracy(right: int, n: int) -> None:
    p = right / n
    values = [100.0] * right + [0.0] * (n - right)
    assert standard_error(values) == pytest.approx(100 * math.sqrt(p * (1 - p) / (n - 1)))


def test_one_value_has_no_standard_error() -> None:
    assert math.isnan(standard_error([3.0]))
    assert math.isnan(standard_error([]))


def test_delta_m_by_hand() -> None:
    # 10 % better on one task, 20 % worse on the other: -100 * (0.1 - 0.2) / 2
    assert delta_m({"a": 88.0, "b": 40.0}, {"a": 80.0, "b": 50.0}) == pytest.approx(5.0)


def test_delta_m_is_zero_against_itself_and_negative_when_better() -> None:
    single = {"a": 80.0, "b": 50.0}
    assert delta_m(single, single) == 0.0
    assert delta_m({"a": 84.0, "b": 52.5}, single) == pytest.approx(-5.0)


def test_delta_m_flips_the_sign_of_costs() -> None:
    # A perplexity that falls by 10 % is as good as a score that rises by 10 %.
    assert delta_m({"ppl": 9.0, "acc": 55.0}, {"ppl": 10.0, "acc": 50.0}, lower_is_better={"ppl"}) == (
        pytest.approx(-10.0)
    )


@pytest.mark.parametrize(
    ("scores", "single", "lower", "message"),
    [
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}, (), r"\['b'\]"),
        ({"a": 1.0}, {"a": 0.0}, (), r"\['a'\] are 0"),
        ({}, {}, (), "no task"),
        ({"a": 1.0}, {"a": 1.0}, ("ppl",), r"\['ppl'\]"),
    ],
)
def test_delta_m_refuses_what_it_cannot_compare(
    scores: dict[str, float], single: dict[str, float], lower: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        delta_m(scores, single, lower_is_better=lower)
