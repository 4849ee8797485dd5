"""The order of training rows: exact shares, no row before its turn, a pure function of its arguments."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.data import MIXINGS, Mixing, mixture_schedule, mixture_shares
from manylora.errors import ConfigError, DataError

sizes_of_tasks = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(1, 30), min_size=1)
strategies = st.sampled_from(MIXINGS)


def by_task(sizes: Mapping[str, int], schedule: list[int]) -> dict[str, list[int]]:
    """Each task's own rows, in the order they come."""
    result: dict[str, list[int]] = {}
    start = 0
    for task, n in sizes.items():
        result[task] = [index - start for index in schedule if start <= index < start + n]
        start += n
    return result


@settings(deadline=None, max_examples=150)
@given(
    sizes=sizes_of_tasks,
    epochs=st.floats(0.01, 4),
    strategy=strategies,
    temperature=st.floats(0.5, 50),
    seed=st.integers(0, 9),
)
def test_counts_shares_and_cycles(
    sizes: dict[str, int], epochs: float, strategy: Mixing, temperature: float, seed: int
) -> None:
    schedule = mixture_schedule(sizes, epochs=epochs, strategy=strategy, temperature=temperature, seed=seed)
    total = max(1, round(epochs * sum(sizes.values())))
    assert len(schedule) == total
    assert all(0 <= index < sum(sizes.values()) for index in schedule)
    rows = by_task(sizes, schedule)
    if strategy == "proportional":
        uses = Counter(schedule)
        assert max(uses.values()) - min(uses[i] for i in range(sum(sizes.values()))) <= 1
        return
    for task, share in mixture_shares(sizes, strategy=strategy, temperature=temperature).items():
        n = sizes[task]
        assert abs(len(rows[task]) - share * total) < 1 + 1e-6
        for start in range(0, len(rows[task]), n):  # every pass over the task holds each row at most once
            one_pass = rows[task][start : start + n]
            assert len(set(one_pass)) == len(one_pass)


def test_proportional_epoch_holds_every_row_once_in_a_fresh_shuffle() -> None:
    schedule = mixture_schedule({"a": 7, "b": 3}, epochs=2.5, strategy="proportional", seed=0)
    first, second, half = schedule[:10], schedule[10:20], schedule[20:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert len(set(half)) == 5


def test_uniform_gives_every_task_the_same_number_spread_over_the_run() -> None:
    sizes = {"small": 5, "large": 95}
    schedule = mixture_schedule(sizes, epochs=4, strategy="uniform", seed=3)
    for epoch in range(4):
        part = by_task(sizes, schedule[100 * epoch : 100 * (epoch + 1)])
        assert abs(len(part["small"]) - 50) <= 2
    assert len(by_task(sizes, schedule)["small"]) == 200
    assert Counter(by_task(sizes, schedule)["small"]) == dict.fromkeys(range(5), 40)


def test_rounding_favours_the_largest_remainder() -> None:
    schedule = mixture_schedule({"a": 1, "b": 8}, epochs=0.5, strategy="temperature", temperature=1, seed=0)
    assert 0 not in schedule  # of 4 rows a's share is 0.44 and b's 3.56
    assert len(schedule) == 4


def test_known_shares() -> None:
    sizes = {"a": 1, "b": 100}
    assert mixture_shares(sizes, strategy="temperature", temperature=2) == pytest.approx(
        {"a": 1 / 11, "b": 10 / 11}
    )
    assert mixture_shares(sizes, strategy="proportional") == pytest.approx({"a": 1 / 101, "b": 100 / 101})
    assert mixture_shares(sizes, strategy="uniform") == {"a": 0.5, "b": 0.5}


@given(sizes=sizes_of_tasks)
def test_temperature_runs_from_proportional_to_uniform(sizes: dict[str, int]) -> None:
    def shares(strategy: Mixing, temperature: float = 2.0) -> dict[str, float]:
        return mixture_shares(sizes, strategy=strategy, temperature=temperature)

    assert shares("temperature", 1) == pytest.approx(shares("proportional"))
    assert shares("temperature", math.inf) == pytest.approx(shares("uniform"))
    assert math.fsum(shares("temperature", 3).values()) == pytest.approx(1)


def test_extreme_temperature_and_sizes_stay_finite() -> None:
    shares = mixture_shares({"a": 1, "b": 10**9}, strategy="temperature", temperature=1e-3)
    assert shares == {"a": 0.0, "b": 1.0}
    assert mixture_schedule({"a": 1, "b": 9}, epochs=1, strategy="temperature", temperature=1e-3, seed=0)


@pytest.mark.parametrize("strategy", MIXINGS)
def test_same_arguments_same_order_in_another_process(strategy: Mixing) -> None:
    code = (
        "from manylora.data import mixture_schedule\n"
        f"print(mixture_schedule({{'a': 9, 'b': 4}}, epochs=2, strategy={strategy!r}, seed=5))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    here = mixture_schedule({"a": 9, "b": 4}, epochs=2, strategy=strategy, seed=5)
    assert other.stdout.strip() == str(here), other.stderr
    assert here != mixture_schedule({"a": 9, "b": 4}, epochs=2, strategy=strategy, seed=6)


def test_longer_run_begins_like_a_shorter_one_when_proportional() -> None:
    short = mixture_schedule({"a": 9, "b": 4}, epochs=2, seed=1)
    assert mixture_schedule({"a": 9, "b": 4}, epochs=3, seed=1)[: len(short)] == short


@pytest.mark.parametrize("epochs", [0, -1, math.inf, math.nan])
def test_epochs_must_be_positive_and_finite(epochs: float) -> None:
    with pytest.raises(ConfigError, match=f"epochs {epochs} must be above 0"):
        mixture_schedule({"a": 1}, epochs=epochs, seed=0)


def test_other_bad_arguments() -> None:
    with pytest.raises(
        ConfigError, match=r"'even' is unknown\. Choose from proportional, uniform, temperature"
    ):
        mixture_shares({"a": 1}, strategy="even")  # type: ignore[arg-type]
    for temperature in (0, -1, math.nan):
        with pytest.raises(ConfigError, match=f"temperature {temperature} must be above 0"):
            mixture_shares({"a": 1}, strategy="temperature", temperature=temperature)
    with pytest.raises(DataError, match="Task 'b' has no rows"):
        mixture_schedule({"a": 1, "b": 0}, epochs=1, seed=0)
    with pytest.raises(DataError, match="no task to train on"):
        mixture_schedule({}, epochs=1, seed=0)
