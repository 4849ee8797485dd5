"""How alike two subspaces are: principal angles, and what chance would give.

σ are the cosines of the principal angles, the singular values of Q1ᵀQ2 with Q1, Q2 orthonormal bases. Reported are
their mean and the mean of their squares; the latter is φ = ‖Q1ᵀQ2‖²_F / min(R1, R2) of Hu et al. (2106.09685, section
7.2). Neither depends on the basis: scaling or mixing the vectors changes nothing.

Shape letters: D dimension of the space, R vectors that span a subspace.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest count as zero: what float32 leaves of a product of lower rank."""

DRAWS = 200
"""Pairs of random subspaces that a baseline is the mean of."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Of two subspaces: 1 where one contains the other, 0 where they are orthogonal."""

    mean_cosine: float
    """Mean σ."""
    mean_squared: float
    """Mean σ²."""


def orthonormal_basis(vectors_RD: Tensor) -> Tensor:
    """Orthonormal basis (D, R') of the span of some vectors, in float64; R' is their numerical rank.

    Args:
        vectors_RD: the vectors as rows: A itself, or B transposed.
    """
    _, sigma_R, rows_RD = torch.linalg.svd(vectors_RD.to("cpu", torch.float64), full_matrices=False)
    rank = int((sigma_R > NEGLIGIBLE * sigma_R[:1]).sum())
    return rows_RD[:rank].T


def principal_cosines(one_DR: Tensor, other_DR: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of two orthonormal bases: (min(R1, R2),), largest first."""
    return torch.linalg.svdvals(one_DR.T @ other_DR).clamp(0, 1)


def compare(one_DR: Tensor, other_DR: Tensor) -> Similarity:
    """Similarity of the spans of two orthonormal bases; of unequal ranks, normalised by the smaller.

    Raises:
        ValueError: a basis is empty: the zero subspace is like nothing.
    """
    if one_DR.shape[1] == 0 or other_DR.shape[1] == 0:
        raise ValueError("The span of zero vectors has no angle to anything.")
    sigma = principal_cosines(one_DR, other_DR)
    return Similarity(mean_cosine=float(sigma.mean()), mean_squared=float(sigma.square().mean()))


def expected_squared(dimension: int, one: int, other: int) -> float:
    """E[mean σ²] of two independent uniformly random subspaces: max(R1, R2) / D.

    E‖Q1ᵀQ2‖²_F = R1·R2 / D, because E[Q2 Q2ᵀ] = (R2 / D)·I; divided by min(R1, R2).

    Args:
        dimension: D.
        one: R1.
        other: R2.
    """
    return max(one, other) / dimension


class RandomBaseline:
    """Similarity of random subspaces of given sizes: mean σ drawn by seed, mean σ² in closed form.

    A size's numbers depend on the seed and that size alone, not on what was asked for before.

    Args:
        seed: of the draws.
        draws: pairs per size.
    """

    def __init__(self, *, seed: int, draws: int = DRAWS) -> None:
        self.seed, self.draws = seed, draws
        self._known: dict[tuple[int, int, int], Similarity] = {}

    def __call__(self, dimension: int, one: int, other: int) -> Similarity:
        """Expected similarity of an R1- and an R2-dimensional random subspace of D dimensions."""
        size = (dimension, min(one, other), max(one, other))
        if size not in self._known:
            drawn = self.draw(*size)
            self._known[size] = Similarity(
                mean_cosine=float(drawn.mean()), mean_squared=expected_squared(*size)
            )
        return self._known[size]

    def draw(self, dimension: int, one: int, other: int) -> Tensor:
        """Mean σ of each drawn pair, (draws,).

        One subspace is fixed to the first R1 axes; by symmetry that changes nothing.
        """
        seed = (self.seed * 1_000_003 + dimension * 8191 + one * 127 + other) % 2**63
        generator = torch.Generator().manual_seed(seed)
        means = []
        for _ in range(self.draws):
            basis_DR, _ = torch.linalg.qr(
                torch.randn(dimension, other, generator=generator, dtype=torch.float64)
            )
            means.append(torch.linalg.svdvals(basis_DR[:one]).mean())
        return torch.stack(means)
