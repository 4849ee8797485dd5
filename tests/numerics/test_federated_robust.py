"""Robust sums against naive twins in float64, closed forms, and what a hostile client can and cannot do to them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from scipy import stats

from federation import WEIGHTS, federation, rows_of, settings
from manylora.errors import ConfigError
from manylora.federated import FederateConfig
from manylora.federated.aggregate import increment, mean
from manylora.federated.robust import (
    Change,
    changes_of,
    clipped_mean,
    norm,
    robust_change,
    shares_of,
    trimmed_mean,
)
from manylora.federated.strategies import STRATEGIES


def random_changes(count: int, seed: int = 0) -> list[Change]:
    torch.manual_seed(seed)
    return [
        {"l.A": torch.randn(3, 5, dtype=torch.float64), "l.B": torch.randn(7, 3, dtype=torch.float64)}
        for _ in range(count)
    ]


def stacked(changes: list[Change], name: str) -> np.ndarray:
    return np.stack([change[name].numpy() for change in changes])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_the_median_is_numpys(count: int) -> None:
    changes = random_changes(count)
    total, _ = robust_change(changes, [1 / count] * count, FederateConfig(robust="median"))
    for name, value in total.items():
        np.testing.assert_allclose(value.numpy(), np.median(stacked(changes, name), axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("count", "trim", "cut"), [(8, 0.25, 2), (8, 0.1, 1), (3, 0.25, 1), (11, 0.3, 3), (2, 0.4, 0)]
)
def test_the_trimmed_mean_is_scipys(count: int, trim: float, cut: int) -> None:
    changes = random_changes(count)
    config = FederateConfig(robust="trimmed-mean", trim=trim)
    total, _ = robust_change(changes, [1 / count] * count, config)
    for name, value in total.items():
        twin = stats.trim_mean(stacked(changes, name), cut / count + 1e-9, axis=0)
        np.testing.assert_allclose(value.numpy(), twin, rtol=1e-12)


@pytest.mark.parametrize("multiple", [0.5, 1.0, 3.0])
def test_the_clipped_mean_is_the_naive_sum(multiple: float) -> None:
    changes = random_changes(5)
    changes[3] = {name: 20 * value for name, value in changes[3].items()}
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    total, parts = clipped_mean(changes, weights, multiple=multiple)
    lengths = [math.sqrt(sum(float((v**2).sum()) for v in change.values())) for change in changes]
    bound = multiple * float(np.median(lengths))
    for name in total:
        twin = sum(
            w * min(1, bound / length) * stacked(changes, name)[k]
            for k, (w, length) in enumerate(zip(weights, lengths, strict=True))
        )
        np.testing.assert_allclose(total[name].numpy(), twin, rtol=1e-12)
    assert parts == pytest.approx(
        [w * min(length, bound) for w, length in zip(weights, lengths, strict=True)]
    )
    assert norm(total) <= bound


def test_by_hand() -> None:
    """Five clients, one number: -100, 1, 2, 3, 1000."""
    changes = [
        {"l.B": torch.tensor([[value]], dtype=torch.float64)} for value in (3.0, -100.0, 1.0, 1000.0, 2.0)
    ]
    total, parts = trimmed_mean(changes, cut=1)
    assert total["l.B"].item() == pytest.approx(2)
    assert parts == pytest.approx([1, 0, 1 / 3, 0, 2 / 3])
    total, parts = trimmed_mean(changes, cut=2)
    assert total["l.B"].item() == pytest.approx(2)
    assert parts == [0, 0, 0, 0, 2]
    total, parts = clipped_mean(changes, [0.2] * 5, multiple=1.0)  # the median norm is 3
    assert total["l.B"].item() == pytest.approx((3 - 3 + 1 + 3 + 2) / 5)
    assert shares_of(parts) == pytest.approx([3 / 12, 3 / 12, 1 / 12, 3 / 12, 2 / 12])


@pytest.mark.parametrize("rule", ["clip", "trimmed-mean", "median"])
def test_equal_changes_stay_what_they_are_and_zero_stays_zero(rule: Any) -> None:
    (change,) = random_changes(1)
    config = FederateConfig(robust=rule)
    total, parts = robust_change([change] * 4, [0.25] * 4, config)
    for name, value in total.items():
        torch.testing.assert_close(value, change[name])
    assert sum(shares_of(parts)) == pytest.approx(1)
    nothing = [{"l.B": torch.zeros(2, 2, dtype=torch.float64)}] * 3
    total, parts = robust_change(nothing, [1 / 3] * 3, config)
    assert not total["l.B"].any()
    assert shares_of(parts) == [0, 0, 0]


@pytest.mark.parametrize("multiple", [1e3, math.inf])
def test_with_a_bound_that_nobody_reaches_clipping_is_the_mean(multiple: float) -> None:
    changes, weights = random_changes(3), [0.5, 0.3, 0.2]
    received = {name: value.float() for name, value in random_changes(1, seed=1)[0].items()}
    states = [{n: received[n].double() + change[n] for n in received} for change in changes]
    total, _ = clipped_mean(changes_of(received, states), weights, multiple=multiple)
    plain = mean(received, zip(weights, states, strict=True), 1.0)
    for name, value in plain.items():
        torch.testing.assert_close((received[name].double() + total[name]).float(), value)


def test_a_product_is_a_change_of_b0_as_it_is() -> None:
    received = {"l.B0": torch.randn(7, 3)}
    answers = [{"l.dB": torch.randn(7, 3, dtype=torch.float64)} for _ in range(3)]
    weights = [0.5, 0.3, 0.2]
    total, _ = clipped_mean(changes_of(received, answers), weights, multiple=1e3)
    plain = increment(received, zip(weights, answers, strict=True), 1.0)
    torch.testing.assert_close((received["l.B0"].double() + total["l.B0"]).float(), plain["l.B0"])


@hypothesis(max_examples=100, deadline=None)
@given(
    honest=st.lists(st.floats(-1, 1), min_size=5, max_size=9),
    hostile=st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=2),
)
@example(honest=[0.0] * 5, hostile=[7.0])
def test_what_a_minority_sends_cannot_carry_the_sum_off(honest: list[float], hostile: list[float]) -> None:
    """Two of seven or more: median and trimmed mean stay within the honest values, clipping within the bound."""
    changes = [{"l.B": torch.tensor([[v]], dtype=torch.float64)} for v in (*honest, *hostile)]
    count = len(changes)
    low, high = min(honest) - 1e-9, max(honest) + 1e-9
    for rule in ("median", "trimmed-mean"):
        config = FederateConfig(robust=rule, trim=0.34)  # type: ignore[arg-type]
        total, _ = robust_change(changes, [1 / count] * count, config)
        assert low <= total["l.B"].item() <= high
    total, _ = clipped_mean(changes, [1 / count] * count, multiple=1.0)
    assert abs(total["l.B"].item()) <= 1 + 1e-9  # the median norm is an honest one


@pytest.mark.parametrize("more", [{}, {"ranks": [6, 3, 2]}, {"strategy": "fedit"}, {"strategy": "fedsa"}])
@pytest.mark.parametrize("rule", ["clip", "trimmed-mean", "median"])
def test_a_whole_round_is_the_rule_over_what_each_client_learnt(
    rule: Any, more: dict[str, Any], tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """What the server has after the round, worked out from each client's own factors after training."""
    config = settings(tiny_base, small_data, robust=rule, local_steps=2, **more)
    rounds, clients = federation(config, rows_of(small_data, test_rows=0), tmp_path)
    rounds._begin()
    begun = {name: value.double().clone() for name, value in rounds.state.shared.items()}
    rounds.run()
    trained = [clients.history[1][name] for name in sorted(WEIGHTS)]
    changes = []
    for state in trained:
        change = {}
        for name, start in begun.items():
            layer, _, part = name.rpartition(".")
            product = part == "B0"
            now = (
                state[f"{layer}.B2"].double() @ state[f"{layer}.B1"].double()
                if product
                else state[name].double()
            )
            change[name] = now if product else now - start
        changes.append(change)
    lengths = [math.sqrt(sum(float((v**2).sum()) for v in change.values())) for change in changes]
    bound = float(np.median(lengths))
    for name, start in begun.items():
        values = stacked(changes, name)
        if rule == "clip":
            weights = [WEIGHTS[k] for k in sorted(WEIGHTS)]
            twin = sum(w * min(1, bound / n) * v for w, n, v in zip(weights, lengths, values, strict=True))
        else:
            twin = np.median(values, axis=0)  # of three, one is cut at each end
        got = rounds.state.shared[name].double() - start
        torch.testing.assert_close(got, torch.as_tensor(twin), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strategy", ["flora", "flexlora", "zero-padding", "local", "centralized"])
def test_a_strategy_that_does_not_add_answers_up_has_no_robust_sum(strategy: Any) -> None:
    assert not STRATEGIES[strategy].linear
    with pytest.raises(ConfigError, match=f"robust median means nothing to strategy {strategy}"):
        FederateConfig(strategy=strategy, robust="median")


def test_the_local_reference_of_a_robust_run_has_nothing_to_sum() -> None:
    assert FederateConfig(robust="median").local_reference().robust == "none"
