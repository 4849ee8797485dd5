"""A sharing scheme is two index vectors and a name: one that is defined here computes, merges and collapses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manylora.adapters import Layout, ops
from manylora.adapters.layout import SCHEMES

N, R, D, OUT, TOKENS = 4, 2, 6, 5, 7
PAIRS = {
    "pairs of A": ((0, 0, 1, 1), (0, 1, 2, 3)),
    "pairs of B": ((0, 1, 2, 3), (0, 0, 1, 1)),
    "crossed": ((0, 0, 1, 1), (0, 1, 0, 1)),
}


@pytest.fixture(params=PAIRS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layout:
    vectors = PAIRS[request.param]
    monkeypatch.setitem(SCHEMES, request.param, lambda n: vectors)  # type: ignore[arg-type]
    return Layout(num_experts=N, rank=R, share=request.param)


def matrices(layout: Layout) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    A = torch.randn(layout.a_count * R, D, dtype=torch.float64)
    return A, torch.randn(OUT, layout.b_count * R, dtype=torch.float64)


def delta(layout: Layout, A: Tensor, B: Tensor, w_N: Tensor) -> Tensor:
    """Σ_n w_n B_b(n) A_a(n), as the formula reads."""
    factors = (layout.expert_factors(A, B, n) for n in range(N))
    return sum((w * b @ a for w, (a, b) in zip(w_N, factors, strict=True)), torch.zeros(OUT, D).double())


@pytest.mark.parametrize("how", ["fused", "stacked", "reference"])
def test_every_computation_follows_the_vectors(layout: Layout, how: str) -> None:
    A, B = matrices(layout)
    x, y = torch.randn(TOKENS, D).double(), torch.randn(TOKENS, OUT).double()
    w_TN = torch.softmax(torch.randn(TOKENS, N).double(), -1)
    expected = y + 2 * torch.stack([delta(layout, A, B, w) @ one for w, one in zip(w_TN, x, strict=True)])
    with ops.computed_by(how):  # type: ignore[arg-type]
        u, _ = ops.project(x, A, None, dropout=0.0)
        torch.testing.assert_close(ops.add_dynamic(y, u, w_TN, B, layout=layout, scaling=2.0), expected)


def test_equal_and_any_weights_make_one_lora_of_the_smaller_rank(layout: Layout) -> None:
    A, B = matrices(layout)
    even, w_N = torch.full((N,), 1 / N).double(), torch.rand(N).double()
    for expected, (a, b) in (
        (delta(layout, A, B, even), layout.static_factors(A, B, "all")),
        (delta(layout, A, B, w_N), layout.weighted_factors(A, B, w_N)),
        (delta(layout, A, B, torch.eye(N)[2].double()), layout.static_factors(A, B, 2)),
    ):
        torch.testing.assert_close(b @ a, expected)
        assert a.shape[0] == b.shape[1] <= min(layout.a_count, layout.b_count) * R
