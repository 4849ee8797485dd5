"""Which matrices the experts share, and what follows from it: the one place that knows a sharing scheme.

A is (nA·R, D) and B is (O, nB·R): distinct matrices in order, R rows (columns) each. Expert n uses number a_of[n] of
the A's and number b_of[n] of the B's. A scheme is these two vectors and a name: to add one, add its line to `SCHEMES`
and its name to `Share`.

Shape letters: D in, O out, R rank, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Share = Literal["A", "B", "none"]
"""Which matrix all experts have in common."""

Choice = int | Literal["all"]
"""A static routing: one expert's index, or "all" for equal weights 1/N."""

SCHEMES: Mapping[Share, Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "B": lambda n: (tuple(range(n)), (0,) * n),
    "A": lambda n: ((0,) * n, tuple(range(n))),
    "none": lambda n: (tuple(range(n)), tuple(range(n))),
}
"""Name to the vectors (a_of, b_of) for n experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How A and B are stacked: N experts of rank R, under one sharing scheme."""

    num_experts: int
    rank: int
    share: Share
    a_of: tuple[int, ...] = field(init=False, repr=False)
    """Expert to the number of its A."""
    b_of: tuple[int, ...] = field(init=False, repr=False)
    """Expert to the number of its B."""
    a_count: int = field(init=False, repr=False)
    """nA, the number of distinct A's."""
    b_count: int = field(init=False, repr=False)
    """nB, the number of distinct B's."""

    def __post_init__(self) -> None:
        a_of, b_of = SCHEMES[self.share](self.num_experts)
        values = {"a_of": a_of, "b_of": b_of, "a_count": len({*a_of}), "b_count": len({*b_of})}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen; computed once, for every forward reads them

    @classmethod
    def of_matrices(cls, A: Tensor, B: Tensor, *, num_experts: int, share: Share) -> Layout | None:
        """The layout of two stacked matrices; None where they are not those of so many experts."""
        rank = A.shape[0] // cls(num_experts=num_experts, rank=1, share=share).a_count
        layout = cls(num_experts=num_experts, rank=rank, share=share)
        fits = rank and A.shape[0] == rank * layout.a_count and B.shape[1] == rank * layout.b_count
        return layout if fits else None

    def expert_factors(self, A: Tensor, B: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """Views of A_n (R, D) and B_n (O, R) of one expert."""
        a = self.a_of[expert] * self.rank
        return A[a : a + self.rank], self.expert_columns(B, expert)

    def expert_columns(self, B: Tensor, expert: int) -> Tensor:
        """View of B_n (O, R) of one expert."""
        b = self.b_of[expert] * self.rank
        return B[:, b : b + self.rank]

    def to_experts(self, x: Tensor, dim: int) -> Tensor:
        """What stands once per A in `dim`, once per expert; a single one stays alone, as it broadcasts."""
        return _picked(x, self.a_of, dim) if 1 < self.a_count < self.num_experts else x

    def to_b(self, x: Tensor, dim: int) -> Tensor:
        """What stands once per expert in `dim`, added up over the experts of each B."""
        return _added_up(x, self.b_of, self.b_count, dim)

    def static_factors(self, A: Tensor, B: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """One LoRA equal to the adapter under a static routing: (R', D) and (O, R'), differentiable.

        R' is R, but N·R for equal weights with nothing shared (method.md, "What can be merged").
        """
        if choice != "all":
            return self.expert_factors(A, B, choice)
        return (A, B) if self.num_experts == 1 else self._one_lora(A, B, _averaged)

    def weighted_factors(self, A: Tensor, B: Tensor, w_N: Tensor) -> tuple[Tensor, Tensor]:
        """One LoRA equal to Σ_n w_n B_b(n) A_a(n): (R', D) and (O, R'), of the rank that equal weights have."""

        def combined(x: Tensor, index: tuple[int, ...], count: int, dim: int) -> Tensor:
            return _added_up(x * w_N.view(-1, *(1,) * (x.dim() - dim - 1)), index, count, dim)

        return self._one_lora(A, B, combined)

    def _one_lora(
        self, A: Tensor, B: Tensor, combined: Callable[[Tensor, tuple[int, ...], int, int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """By linearity the A's of the experts of one B add up, and so do the B's of the experts of one A.

        Whichever leaves the smaller rank, min(nA, nB)·R.
        """
        if self.b_count < self.a_count:
            a_NRD = _picked(A.unflatten(0, (self.a_count, self.rank)), self.a_of, 0)
            return combined(a_NRD, self.b_of, self.b_count, 0).flatten(0, 1), B
        b_ONR = _picked(B.unflatten(1, (self.b_count, self.rank)), self.b_of, 1)
        return A, combined(b_ONR, self.a_of, self.a_count, 1).flatten(1)


def _picked(x: Tensor, index: tuple[int, ...], dim: int) -> Tensor:
    """The entries of `dim` that `index` names, in its order."""
    if index == tuple(range(x.shape[dim])):
        return x
    return x.index_select(dim, torch.tensor(index, device=x.device))


def _added_up(x: Tensor, index: tuple[int, ...], count: int, dim: int) -> Tensor:
    """Sums of the entries of `dim` that `index` gives the same number, 0 to `count` - 1."""
    if count == len(index):
        return x
    if count == 1:
        return x.sum(dim, keepdim=True)
    shape = list(x.shape)
    shape[dim] = count
    return x.new_zeros(shape).index_add(dim, torch.tensor(index, device=x.device), x)


def _averaged(x: Tensor, index: tuple[int, ...], count: int, dim: int) -> Tensor:
    """`_added_up` by the length of `index`. In low precision a mean rounds once, where sum and quotient do twice."""
    return x.mean(dim, keepdim=True) if count == 1 else _added_up(x, index, count, dim) / len(index)
