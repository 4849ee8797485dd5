"""Points lost between two models' answers to the same rows, and how layers are grouped into passes."""

from __future__ import annotations

import math

import pytest

from manylora.data import Example
from manylora.evaluation import paired_loss, score_all
from manylora.evaluation.collapse import _groups


def rows(task: str, outputs: list[str]) -> list[Example]:
    return [Example(task=task, instruction="say", output=output) for output in outputs]


def test_paired_loss_is_per_row_and_every_task_counts_alike() -> None:
    data = {"a": rows("a", ["x", "y", "z", "w"]), "b": rows("b", ["p", "q"])}
    before = score_all(data, {"a": ["x", "y", "z", "no"], "b": ["p", "no"]})
    after = score_all(data, {"a": ["x", "no", "z", "w"], "b": ["no", "no"]})
    loss = paired_loss(before, after)
    assert loss.tasks["a"].mean == pytest.approx(0)  # one row lost, one won
    # differences 0, 100, 0, -100: sd = sqrt(20000 / 3), over sqrt(4)
    assert loss.tasks["a"].standard_error == pytest.approx(math.sqrt(20000 / 3) / 2)
    assert loss.tasks["b"].mean == pytest.approx(50)
    assert loss.tasks["b"].standard_error == pytest.approx(50)
    assert loss.mean == pytest.approx(25) == pytest.approx(before.mean - after.mean)
    assert loss.standard_error == pytest.approx(math.hypot(math.sqrt(20000 / 3) / 2, 50) / 2)
    assert loss.to_dict()["tasks"]["b"] == {"mean": 50.0, "standard_error": pytest.approx(50), "n": 2}


def test_one_row_has_no_standard_error() -> None:
    data = {"a": rows("a", ["x"])}
    loss = paired_loss(score_all(data, {"a": ["x"]}), score_all(data, {"a": ["no"]}))
    assert loss.mean == pytest.approx(100)
    assert loss.to_dict()["standard_error"] is None


@pytest.mark.parametrize(
    ("most", "wanted"),
    [(100, [["a", "b", "c", "d"]]), (6, [["a", "b"], ["c"], ["d"]]), (1, [["a"], ["b"], ["c"], ["d"]])],
)
def test_layers_are_grouped_by_memory(most: int, wanted: list[list[str]]) -> None:
    assert _groups({"a": 3, "b": 3, "c": 9, "d": 2}, most) == wanted


def test_layers_without_sums_stand_together() -> None:
    assert _groups({"a": 0, "b": 0}, 0) == [["a", "b"]]
