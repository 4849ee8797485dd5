"""Task weights: how often tasks and rows are drawn, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from manylora.cli.options import TrainOptions
from manylora.cli.parsing import parse
from manylora.data import mixture_schedule
from manylora.errors import ConfigError
from manylora.training import TrainConfig, plan_lines, prepare
from manylora.training.task_weights import schedule, weighted_sizes

SIZES = {"a": 30, "b": 60, "c": 10}


def counts(order: list[int]) -> dict[str, int]:
    ends = {"a": 30, "b": 90, "c": 100}
    return dict(Counter(next(task for task, end in ends.items() if index < end) for index in order))


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ({"a": 2.0}, {"a": 60, "b": 60, "c": 10}),
        ({"a": 0.5, "c": 6.0}, {"a": 15, "b": 60, "c": 60}),
        ({"b": 1 / 3}, {"a": 30, "b": 20, "c": 10}),
        ({"a": 1000.0}, {"a": 30000, "b": 60, "c": 10}),
    ],
)
def test_a_task_is_drawn_as_if_it_had_more_rows(weights: dict[str, float], shares: dict[str, int]) -> None:
    order = schedule(SIZES, TrainConfig(weights=weights, epochs=5.0))
    assert len(order) == 500  # as without weights
    found, total = counts(order), sum(shares.values())
    for task, share in shares.items():
        assert found.get(task, 0) == pytest.approx(500 * share / total, abs=1)
    times = Counter(order)
    for first, end in ((0, 30), (30, 90), (90, 100)):  # all rows of a task once before any again
        of_task = [times[index] for index in range(first, end)]
        assert max(of_task) - min(of_task) <= 1


def test_a_temperature_counts_the_weighted_rows() -> None:
    config = TrainConfig(weights={"c": 9.0}, epochs=4.0, mixing="temperature", mixing_temperature=2.0)
    found = counts(schedule(SIZES, config))
    roots = {"a": 30**0.5, "b": 60**0.5, "c": 90**0.5}
    for task, root in roots.items():
        assert found[task] == pytest.approx(400 * root / sum(roots.values()), abs=1)


def test_the_tasks_are_spread_over_the_run_and_the_order_follows_the_seed() -> None:
    config = TrainConfig(weights={"c": 6.0}, epochs=2.0)
    order = schedule(SIZES, config)
    assert order == schedule(SIZES, config)
    assert order != schedule(SIZES, TrainConfig(weights={"c": 6.0}, epochs=2.0, seed=1))
    halves = [counts(half) for half in (order[:100], order[100:])]
    for task in SIZES:
        assert abs(halves[0][task] - halves[1][task]) <= 2


def test_extreme_weights_take_no_more_memory() -> None:
    sizes = {"rare": 1, "frequent": 100_000}
    counted = weighted_sizes(sizes, {"rare": 1e-6, "frequent": 1000.0})
    assert counted["rare"] == 1
    assert sum(counted.values()) <= 10 * sum(sizes.values()) + 1


def test_without_weights_nothing_changes() -> None:
    assert schedule(SIZES, TrainConfig(epochs=2.0)) == mixture_schedule(SIZES, epochs=2.0, seed=0)


def test_words_and_mappings_are_the_same_and_survive_the_run_folder(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("weights: {a: 2, b/c=d: 0.5}\n", encoding="utf-8")
    typed, _ = parse(TrainOptions, ["--weights", "a=2, b/c=d=0.5"], verb="train", description="")
    read, _ = parse(TrainOptions, ["--config", str(file)], verb="train", description="")
    assert typed.weights == read.weights == {"a": 2.0, "b/c=d": 0.5}
    resolved = TrainConfig(weights="a=2").resolved()
    assert TrainConfig(**resolved.to_dict()) == resolved


def test_the_plan_shows_them(tiny_base: Path, small_data: Path) -> None:
    prepared = prepare(
        TrainConfig(model=str(tiny_base), data=str(small_data), device="cpu", weights={"swap": 2.0})
    )
    lines = dict(plan_lines(prepared.plan, prepared.config))
    assert lines["weights"] == "swap 2; of the rows read first_word 25.0 %, last_word 25.0 %, swap 50.0 %"
    drawn = Counter(index // 22 for index in prepared.order)  # 22 rows a task, in this order
    assert drawn[2] == pytest.approx(len(prepared.order) / 2, abs=1)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("a=0", "the weight of task 'a' is 0; give a number above 0"),
        ({"a": -1.0}, "the weight of task 'a' is -1; give a number above 0"),
        ({"a": 1e6}, r"the weight of task 'a' is 1e\+06; .* at most 1000"),
        ("a=nan", "the weight of task 'a' is nan; give a number above 0"),
        ("a", "weights hold no list of tasks"),
        ("a=b", "weights hold no list of tasks"),
        ({}, "weights hold no list of tasks"),
        ({"a": "b"}, "weights is .* not a mapping or text or null"),
    ],
)
def test_what_is_no_weight_is_refused(weights: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(weights=weights)


def test_unknown_tasks_and_uniform_mixing_are_refused(tiny_base: Path, small_data: Path) -> None:
    config = TrainConfig(model=str(tiny_base), data=str(small_data), device="cpu", weights="swop=2")
    with pytest.raises(ConfigError, match=r"weights name 'swop', which is no task here; the tasks: .*swap"):
        prepare(config)
    with pytest.raises(ConfigError, match="weights mean nothing to mixing uniform"):
        TrainConfig(weights="a=2", mixing="uniform")
