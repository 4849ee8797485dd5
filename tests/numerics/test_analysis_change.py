"""Change during training: closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manylora.analysis import Layer, Source, changes, movement


def rows(*vectors: list[float]) -> Tensor:
    return torch.tensor(vectors, dtype=torch.float64)


def test_scaling_changes_magnitude_alone() -> None:
    before = rows([3, 4, 0], [0, 0, 2])
    found = movement(before, torch.tensor([[2.0], [0.5]]) * before)
    assert found.magnitude == pytest.approx((1 + 0.5) / 2)
    assert found.direction == pytest.approx(0)
    assert found.similarity == pytest.approx(1)


@pytest.mark.parametrize("degrees", [0, 45, 90, 180])
def test_turning_changes_direction_alone(degrees: int) -> None:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    before = rows([2, 0, 0], [0, 1, 0])
    after = rows([2 * cos, 0, 2 * sin], [0, 1, 0])
    found = movement(before, after)
    assert found.magnitude == pytest.approx(0, abs=1e-12)
    assert found.direction == pytest.approx((1 - cos) / 2)
    assert found.similarity == pytest.approx((abs(cos) + 1) / 2)


def test_vectors_that_were_zero_do_not_count() -> None:
    found = movement(rows([0, 0], [1, 0]), rows([5, 5], [2, 0]))
    assert (found.magnitude, found.direction) == pytest.approx((1, 0))
    nothing = movement(torch.zeros(2, 4), torch.ones(2, 4))
    assert (nothing.similarity, nothing.magnitude, nothing.direction) == (None, None, None)
    gone = movement(rows([1, 0]), rows([0, 0]))
    assert (gone.magnitude, gone.direction) == (1, None)


def layer(A: Tensor, B: Tensor) -> dict[str, Layer]:
    return {"model.layers.1.self_attn.q_proj": Layer(A={"": A}, B={"": B})}


class Kept(Source):
    """A source whose snapshots are in memory."""

    def snapshot(self, step: int) -> dict[str, Layer]:
        return MOMENTS[step]


A0, B5 = rows([1, 0, 0], [0, 1, 0]), rows([1, 0], [0, 1], [0, 0])
MOMENTS = {
    0: layer(A0, torch.zeros(3, 2)),
    2: layer(2 * A0, torch.zeros(3, 2)),
    5: layer(2 * A0, B5),
    9: layer(3 * A0, 4 * B5),
}


def test_b_is_compared_with_the_first_step_in_which_it_is_not_zero_and_a_with_that_and_the_start() -> None:
    source = Kept(
        name="run", path=Path(), folder=Path(), format="lora", share="B",
        layers=layer(6 * A0, 5 * B5), snapshots=dict.fromkeys(MOMENTS, Path()), last_step=20,
    )  # fmt: skip
    found = {(c.matrix, c.from_step, c.to_step): c for c in changes(source)}
    assert set(found) == {
        ("A", 0, 2), ("A", 0, 5), ("A", 0, 9), ("A", 0, 20), ("A", 5, 9), ("A", 5, 20), ("B", 5, 9), ("B", 5, 20),
    }  # fmt: skip
    assert found["A", 0, 20].magnitude == pytest.approx(5)
    assert found["A", 5, 20].magnitude == pytest.approx(2)
    assert found["B", 5, 9].magnitude == pytest.approx(3)
    assert found["B", 5, 20].magnitude == pytest.approx(4)
    assert [c.direction for c in found.values()] == pytest.approx([0] * 8)
    assert (found["B", 5, 9].layer, found["B", 5, 9].module) == (1, "q_proj")


def test_a_run_that_kept_nothing_has_no_change() -> None:
    source = Source(
        name="run", path=Path(), folder=Path(), format="lora", share="B", layers=layer(A0, B5), last_step=20
    )  # fmt: skip
    assert changes(source) == []
