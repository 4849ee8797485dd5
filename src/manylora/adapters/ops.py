"""The one place where an adapter's contribution is computed.

y' = y + s · Σ_n w_n(x) · B_b(n) A_a(n) x       (2509.25414, section 4; HydraLoRA 2404.19245; LoRA 2106.09685)

Shape letters: T tokens (any leading dimensions), D in, O out, R rank, N experts.
A is (nA·R, D) and B is (O, nB·R): experts in order, R rows (columns) each; nA, nB are 1 where shared, else N.

It has three parts. `project`: x through all A's at once, and through the router. Routing weights, between them:
*dynamic*, one per token and expert, `w_TN`; or *static*, not depending on the input (one expert, or all alike), so
that the experts become one LoRA (`static_factors`). `add_dynamic` and `add_static`: weigh, and add B's product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.adapters.dropout import draw_drops, dropped_out
from manylora.adapters.fused import AddProduct, Project
from manylora.adapters.layout import Choice, Layout

Computation = Literal["fused", "stacked", "reference"]
"""How contributions are computed.

"fused": `fused`'s autograd functions. "stacked": the same products by plain autograd operations, which
torch.compile can fuse on its own and function transforms can follow (both use it unasked). "reference": one pass
per expert, as the formula reads; what the others are compared with.
"""

_computation: Computation = "fused"


@contextmanager
def computed_by(computation: Computation) -> Iterator[None]:
    """Choose how contributions are computed inside the block; for tests and benchmarks.

    Process-wide, so not for use while other threads run models.
    """
    global _computation
    before, _computation = _computation, computation
    try:
        yield
    finally:
        _computation = before


def computation() -> Computation:
    """How contributions are computed here and now."""
    if _computation == "fused" and (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    ):
        return "stacked"
    return _computation


def project(
    x_TD: Tensor, A: Tensor, router_ND: Tensor | None, *, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """(dropout(x) Aᵀ, x W_gᵀ): (…, M) and (…, N), one mask for all experts and none for the router.

    Args:
        x_TD: the layer's input, (…, D), in any dtype; computed in the dtype of A.
        A: stacked down-projections, (M, D) with M = nA·R, or R' for those of a static routing.
        router_ND: W_g; None: no token router.
        dropout: probability of a zero; 0 where not in training.
    """
    how = computation()
    if how == "fused":
        flat_TD = x_TD.reshape(-1, A.shape[1])
        places = draw_drops(flat_TD, dropout) if dropout else None
        u_MT, logits_NT = Project.apply(flat_TD, A, router_ND, places, dropout)
        return _tokens_first(u_MT, x_TD), None if logits_NT is None else _tokens_first(logits_NT, x_TD)
    x_TD = x_TD.to(A.dtype)
    dropped_TD = x_TD
    if dropout:
        # The reference draws the mask that the fused computation draws; a compiler fuses torch's own.
        places = draw_drops(x_TD, dropout) if how == "reference" else None
        dropped_TD = F.dropout(x_TD, dropout) if places is None else dropped_out(x_TD, places, dropout)
    return (F.linear(dropped_TD, A), None if router_ND is None else F.linear(x_TD, router_ND))


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


def choice_weights(choice: Choice, num_experts: int, *, like: Tensor) -> Tensor:
    """A static routing as weights (N,), in the dtype and on the device of `like`."""
    if choice == "all":
        return like.new_full((num_experts,), 1 / num_experts)
    return F.one_hot(torch.tensor(choice, device=like.device), num_experts).to(like.dtype)


def add_dynamic(
    y_TO: Tensor,
    u_TM: Tensor,
    w_TN: Tensor,
    B: Tensor,
    *,
    layout: Layout,
    scaling: float,
    in_place: bool = False,
) -> Tensor:
    """y + s · Σ_n w_n · B_b(n) u_a(n).

    Args:
        y_TO: output of the base layer, (…, O).
        u_TM: the experts' projections side by side, (…, nA·R), in the dtype of B.
        w_TN: routing weights, broadcastable to (…, N).
        B: stacked up-projections, (O, nB·R).
        layout: how A and B are stacked.
        scaling: s.
        in_place: whether y is the caller's alone, so that the sum may be written into it.
    """
    w_TN = w_TN.to(u_TM.dtype)
    how = computation()
    if how == "reference":
        u_TnR = u_TM.unflatten(-1, (layout.a_count, layout.rank))
        return _loop(y_TO, u_TnR, w_TN, B, layout=layout, scaling=scaling)
    # B is linear, so experts that share a B are combined before it, in R dimensions; with several B's,
    # the weighted projections side by side meet the B's side by side in one product.
    if how == "fused":
        w_TN = w_TN.expand(*u_TM.shape[:-1], layout.num_experts)
        w_NT = _tokens_last(w_TN).contiguous()
        u_nRT = _tokens_last(u_TM).unflatten(0, (layout.a_count, layout.rank))
        p_NRT = w_NT.unsqueeze(1) * layout.to_experts(u_nRT, 0)
        h_TR = _tokens_first(layout.to_b(p_NRT, 0).flatten(0, 1), u_TM)
    else:
        u_TnR = u_TM.unflatten(-1, (layout.a_count, layout.rank))
        p_TNR = w_TN.unsqueeze(-1) * layout.to_experts(u_TnR, -2)
        h_TR = layout.to_b(p_TNR, -2).flatten(-2)
    return add_static(y_TO, h_TR, B, scaling=scaling, in_place=in_place)


def add_static(y_TO: Tensor, h_TR: Tensor, b_OR: Tensor, *, scaling: float, in_place: bool = False) -> Tensor:
    """y + s · h Bᵀ in y's dtype, as one product added into y where the dtypes allow it.

    Args:
        y_TO: output of the base layer, (…, O).
        h_TR: the projection, (…, R').
        b_OR: the up-projection, (O, R').
        scaling: s.
        in_place: as in `add_dynamic`.
    """
    if computation() == "fused":
        # A view's history would be rewritten with copies, a leaf's must not change.
        owned = in_place and y_TO.is_contiguous() and not y_TO._is_view()
        owned = owned and not (y_TO.is_leaf and y_TO.requires_grad)
        return AddProduct.apply(y_TO, _tokens_last(h_TR), b_OR, scaling, owned)
    if y_TO.dtype == h_TR.dtype == b_OR.dtype:
        flat_TO, flat_TR = y_TO.reshape(-1, b_OR.shape[0]), h_TR.reshape(-1, b_OR.shape[1])
        return torch.addmm(flat_TO, flat_TR, b_OR.t(), alpha=scaling).view(y_TO.shape)
    return (y_TO + F.linear(h_TR, b_OR) * scaling).to(y_TO.dtype)


def static_delta(A: Tensor, B: Tensor, choice: Choice, *, layout: Layout, scaling: float) -> Tensor:
    """The weight (O, D) that a static routing adds to the base weight."""
    a_RD, b_OR = layout.static_factors(A, B, choice)
    return (b_OR @ a_RD) * scaling


def _tokens_first(narrow_MT: Tensor, like: Tensor) -> Tensor:
    """(M, T) seen as (…, M), with the leading dimensions of `like`; the memory stays as it is."""
    return narrow_MT.t().view(*like.shape[:-1], narrow_MT.shape[0])


def _tokens_last(narrow: Tensor) -> Tensor:
    """(…, M) seen as (M, T); no copy of what `_tokens_first` made."""
    return narrow.reshape(-1, narrow.shape[-1]).t()


def _loop(y_TO: Tensor, u_TnR: Tensor, w_TN: Tensor, B: Tensor, *, layout: Layout, scaling: float) -> Tensor:
    """One pass per expert, as the formula reads."""
    total: Tensor | None = None
    for n in range(layout.num_experts):
        u_TR = u_TnR[..., layout.a_of[n], :]
        part = w_TN[..., n, None] * F.linear(u_TR, layout.expert_columns(B, n))
        total = part if total is None else total + part
    assert total is not None
    return (y_TO + total * scaling).to(y_TO.dtype)
