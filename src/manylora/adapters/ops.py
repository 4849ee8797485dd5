"""The one place where an adapter's contribution is computed.

y' = y + s · Σ_n w_n(x) · B_b(n) A_a(n) x       (2509.25414, section 4; HydraLoRA 2404.19245; LoRA 2106.09685)

Shape letters: T tokens (any leading dimensions), D in, O out, R rank, N experts.
A is (nA·R, D) and B is (O, nB·R): experts in order, R rows (columns) each; nA, nB are 1 where shared, else N.

Two kinds of routing reach this file. *Dynamic*: a weight per token and expert, `w_TN`. *Static*: weights that
do not depend on the input (one expert, or all alike), so the experts become one LoRA (`static_factors`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Computation = Literal["stacked", "reference"]
Choice = int | Literal["all"]
"""A static routing: one expert's index, or "all" for equal weights 1/N."""

_computation: Computation = "stacked"


@contextmanager
def computed_by(computation: Computation) -> Iterator[None]:
    """Choose how contributions are computed inside the block: "stacked" (default) or the "reference" loop.

    For tests and benchmarks; process-wide, so not for use while other threads run models.
    """
    global _computation
    before, _computation = _computation, computation
    try:
        yield
    finally:
        _computation = before


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How A and B are stacked: N experts of rank R, and which of the two matrices is shared."""

    num_experts: int
    rank: int
    share: Literal["A", "B", "none"]

    @property
    def a_count(self) -> int:
        """Number of distinct A's."""
        return 1 if self.share == "A" else self.num_experts

    @property
    def b_count(self) -> int:
        """Number of distinct B's."""
        return 1 if self.share == "B" else self.num_experts

    def expert_factors(self, A: Tensor, B: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """Views of A_n (R, D) and B_n (O, R) of one expert."""
        a = expert * self.rank if self.a_count > 1 else 0
        b = expert * self.rank if self.b_count > 1 else 0
        return A[a : a + self.rank], B[:, b : b + self.rank]

    def static_factors(self, A: Tensor, B: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """One LoRA equal to the adapter under a static routing: (R', D) and (O, R'), differentiable.

        R' is R, but N·R for equal weights with nothing shared (method.md, "What can be merged").
        """
        if choice != "all":
            return self.expert_factors(A, B, choice)
        if self.num_experts == 1:
            return A, B
        if self.share == "B":
            return A.view(self.num_experts, self.rank, -1).mean(0), B
        if self.share == "A":
            return A, B.view(-1, self.num_experts, self.rank).mean(1)
        return A, B / self.num_experts


def routing_weights(logits_TN: Tensor, *, top_k: int | None = None, temperature: float = 1.0) -> Tensor:
    """softmax(W_g x) per token, (…, N), in the logits' dtype.

    The softmax runs in float32 at least: in bfloat16 the weights would no longer sum to 1.

    Args:
        logits_TN: W_g x.
        top_k: only the k largest count, and sum to 1 (2401.04088); None: all do. With k = 1 that one keeps its
            share of the full softmax (2101.03961): a weight that is always 1 would never train the router.
        temperature: the logits are divided by it.
    """
    wide = torch.promote_types(logits_TN.dtype, torch.float32)
    scaled_TN = logits_TN if temperature == 1 else logits_TN.to(wide) / temperature
    if top_k is None:
        return torch.softmax(scaled_TN, dim=-1, dtype=wide).to(logits_TN.dtype)
    chosen_TN = torch.zeros_like(logits_TN, dtype=torch.bool)
    chosen_TN = chosen_TN.scatter(-1, logits_TN.detach().topk(top_k, dim=-1).indices, True)
    if top_k == 1:
        w_TN = torch.softmax(scaled_TN, dim=-1, dtype=wide) * chosen_TN
    else:
        w_TN = torch.softmax(scaled_TN.masked_fill(~chosen_TN, float("-inf")), dim=-1, dtype=wide)
    return w_TN.to(logits_TN.dtype)


def add_dynamic(
    y_TO: Tensor, x_TD: Tensor, w_TN: Tensor, A: Tensor, B: Tensor, *, layout: Layout, scaling: float
) -> Tensor:
    """y + s · Σ_n w_n · B_b(n) A_a(n) x.

    Args:
        y_TO: output of the base layer, (…, O).
        x_TD: input after dropout, (…, D), in the dtype of A and B.
        w_TN: routing weights, broadcastable to (…, N).
        A: stacked down-projections, (nA·R, D).
        B: stacked up-projections, (O, nB·R).
        layout: how A and B are stacked.
        scaling: s.
    """
    if _computation == "reference":
        return _loop(y_TO, x_TD, w_TN, A, B, layout=layout, scaling=scaling)
    u_TnR = F.linear(x_TD, A).unflatten(-1, (layout.a_count, layout.rank))
    p_TNR = w_TN.unsqueeze(-1).to(u_TnR.dtype) * u_TnR
    # B is linear, so with one shared B the experts are combined before it, in R dimensions;
    # with N of them, the weighted projections side by side meet the B's side by side in one product.
    h_TR = p_TNR.sum(-2) if layout.b_count == 1 else p_TNR.flatten(-2)
    return _add_product(y_TO, h_TR, B, scaling)


def add_static(
    y_TO: Tensor, x_TD: Tensor, choice: Choice, A: Tensor, B: Tensor, *, layout: Layout, scaling: float
) -> Tensor:
    """Like `add_dynamic` for weights that do not depend on the input: one expert, or all alike."""
    if _computation == "reference":
        w_N = x_TD.new_full((layout.num_experts,), 1 / layout.num_experts)
        if choice != "all":
            w_N = F.one_hot(torch.tensor(choice, device=x_TD.device), layout.num_experts).to(x_TD.dtype)
        return _loop(y_TO, x_TD, w_N, A, B, layout=layout, scaling=scaling)
    a_RD, b_OR = layout.static_factors(A, B, choice)
    return _add_product(y_TO, F.linear(x_TD, a_RD), b_OR, scaling)


def static_delta(A: Tensor, B: Tensor, choice: Choice, *, layout: Layout, scaling: float) -> Tensor:
    """The weight (O, D) that a static routing adds to the base weight."""
    a_RD, b_OR = layout.static_factors(A, B, choice)
    return (b_OR @ a_RD) * scaling


def _add_product(y_TO: Tensor, h_TR: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """y + s · h Bᵀ in y's dtype, as one addmm where the dtypes allow it."""
    if y_TO.dtype == h_TR.dtype == b_OR.dtype:
        flat_y, flat_h = y_TO.reshape(-1, b_OR.shape[0]), h_TR.reshape(-1, b_OR.shape[1])
        return torch.addmm(flat_y, flat_h, b_OR.t(), alpha=scaling).view(y_TO.shape)
    return (y_TO + F.linear(h_TR, b_OR) * scaling).to(y_TO.dtype)


def _loop(
    y_TO: Tensor, x_TD: Tensor, w_TN: Tensor, A: Tensor, B: Tensor, *, layout: Layout, scaling: float
) -> Tensor:
    """One pass per expert, as the formula reads; what the fused forms are compared with."""
    total: Tensor | None = None
    for n in range(layout.num_experts):
        a_RD, b_OR = layout.expert_factors(A, B, n)
        part = w_TN[..., n, None].to(x_TD.dtype) * F.linear(F.linear(x_TD, a_RD), b_OR)
        total = part if total is None else total + part
    assert total is not None
    return (y_TO + total * scaling).to(y_TO.dtype)
