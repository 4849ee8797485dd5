"""Principal angles: closed forms, scipy, chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from manylora.analysis import (
    RandomBaseline,
    compare,
    expected_squared,
    orthonormal_basis,
    principal_cosines,
)


def random(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def similarity(one_RD: Tensor, other_RD: Tensor) -> tuple[float, float]:
    found = compare(orthonormal_basis(one_RD), orthonormal_basis(other_RD))
    return found.mean_cosine, found.mean_squared


def test_a_subspace_is_like_itself_and_unlike_its_complement() -> None:
    A_RD = random(4, 20, 0)
    assert similarity(A_RD, A_RD) == pytest.approx((1, 1))
    complement_RD = torch.linalg.svd(A_RD, full_matrices=True).Vh[4:8]
    assert similarity(A_RD, complement_RD) == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize("degrees", [0, 30, 60, 90])
def test_a_rotated_plane_has_the_angle_it_was_rotated_by(degrees: int) -> None:
    """Two axes turned out of their plane by one angle each: σ = cos of that angle, twice."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    one = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    other = torch.tensor([[cos, 0, sin, 0], [0, cos, 0, sin]])
    assert similarity(one, other) == pytest.approx((cos, cos**2), abs=1e-7)


@pytest.mark.parametrize(("one", "other"), [(5, 5), (3, 7), (7, 3), (1, 6)])
def test_angles_are_scipys(one: int, other: int) -> None:
    first, second = random(one, 30, 1), random(other, 30, 2)
    want = np.sort(np.cos(subspace_angles(first.numpy().T, second.numpy().T)))[::-1]
    got = principal_cosines(orthonormal_basis(first), orthonormal_basis(second))
    assert got.shape == (min(one, other),)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-10)
    assert similarity(first, second) == pytest.approx((want.mean(), (want**2).mean()))


def test_mean_squared_is_the_normalised_frobenius_norm() -> None:
    """φ = ‖Q1ᵀQ2‖²_F / R (2106.09685, section 7.2)."""
    one, other = orthonormal_basis(random(4, 25, 3)), orthonormal_basis(random(4, 25, 4))
    phi = float((one.T @ other).norm() ** 2) / 4
    assert compare(one, other).mean_squared == pytest.approx(phi)


def test_the_basis_of_the_span_does_not_matter() -> None:
    """A → M A and B → B M change neither row space nor column space."""
    A_RD, other_RD, M_RR = random(5, 40, 5), random(5, 40, 6), random(5, 5, 7)
    assert similarity(M_RR @ A_RD, other_RD) == pytest.approx(similarity(A_RD, other_RD))
    B_OR, M_RR = random(33, 5, 8), random(5, 5, 9)
    assert similarity((B_OR @ M_RR).T, random(5, 33, 10)) == pytest.approx(
        similarity(B_OR.T, random(5, 33, 10))
    )


def test_padding_with_zeros_and_repeating_a_row_do_not_make_a_subspace_larger() -> None:
    A_RD, other_RD = random(3, 20, 11), random(4, 20, 12)
    padded = torch.cat([A_RD, torch.zeros(2, 20), A_RD[:1]])
    assert orthonormal_basis(padded).shape == (20, 3)
    assert similarity(padded, other_RD) == pytest.approx(similarity(A_RD, other_RD))
    product = (random(20, 3, 13) @ random(3, 8, 14)).float()  # rank 3, to float32's rounding
    assert orthonormal_basis(product.T).shape == (20, 3)


def test_a_subspace_inside_a_larger_one_is_wholly_like_it() -> None:
    A_RD = random(6, 20, 15)
    assert similarity(A_RD[:2], A_RD) == pytest.approx((1, 1))


def test_zero_vectors_have_no_angle() -> None:
    with pytest.raises(ValueError, match="zero vectors"):
        similarity(torch.zeros(2, 10), random(2, 10, 16))


@pytest.mark.parametrize(("dimension", "one", "other"), [(16, 4, 4), (32, 2, 8), (10, 8, 8)])
def test_the_expected_square_is_that_of_drawn_subspaces(dimension: int, one: int, other: int) -> None:
    """Both subspaces drawn here, by another way than the baseline's, 2,000 times."""
    generator = torch.Generator().manual_seed(17)
    bases = [
        torch.linalg.qr(torch.randn(2000, dimension, size, generator=generator, dtype=torch.float64)).Q
        for size in (one, other)
    ]
    sigma = torch.linalg.svdvals(bases[0].mT @ bases[1])
    squares = sigma.square().mean(1)
    error = float(squares.std() / math.sqrt(len(squares)))
    assert expected_squared(dimension, one, other) == max(one, other) / dimension
    assert float(squares.mean()) == pytest.approx(expected_squared(dimension, one, other), abs=4 * error)
    baseline = RandomBaseline(seed=0, draws=2000)(dimension, one, other)
    cosines = sigma.mean(1)
    error = float(cosines.std() / math.sqrt(len(cosines)))
    assert baseline.mean_cosine == pytest.approx(float(cosines.mean()), abs=6 * error)
    assert baseline.mean_squared == expected_squared(dimension, one, other)


def test_a_baseline_is_its_seeds_and_sizes_alone() -> None:
    first = RandomBaseline(seed=3, draws=20)
    first(12, 2, 2)
    second = RandomBaseline(seed=3, draws=20)
    assert first(30, 4, 2) == second(30, 2, 4)
    assert first(30, 4, 2) != RandomBaseline(seed=4, draws=20)(30, 4, 2)


def test_fresh_adapters_of_different_seeds_are_like_random_subspaces() -> None:
    """PEFT's kaiming-uniform A against the baseline's normal one."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(100):
        one, other = (torch.rand(8, 128, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
        found.append(similarity(one, other))
    cosine, squared = np.array(found).mean(0)
    baseline = RandomBaseline(seed=0)(128, 8, 8)
    assert cosine == pytest.approx(baseline.mean_cosine, rel=0.02)
    assert squared == pytest.approx(8 / 128, rel=0.05)
