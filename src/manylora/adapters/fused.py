"""The two ends of an adapter as autograd functions that keep and write as little as possible.

Plain autograd would write the base output twice, keep a dropped copy of the input, read the input once for the
experts and again for the router, and add up their gradients in extra passes. What lies between the two ends
(routing weights, the weighted sum) is N·R wide or less and stays plain autograd: there is nothing to save.

Shape letters: T tokens (one dimension here), D in, O out, M rows of the stacked down-projections, R columns of B,
N experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manylora.adapters.dropout import product_with_zeros, with_zeros

Gradients = tuple[Tensor | None, ...]


class Project(Function):
    """(dropout(x) Aᵀ, x W_gᵀ): the experts' projections (T, M) and the router's logits (T, N).

    Keeps x itself, in its own dtype, and the places of the mask's zeros. Without dropout one product computes
    both, and one more each of their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, a_MD: Tensor, router_ND: Tensor | None, places: Tensor | None, p: float
    ) -> tuple[Tensor, Tensor | None]:
        """The projections (T, M), and the logits (T, N) where there is a router."""
        ctx.save_for_backward(x_TD, a_MD, router_ND, places)
        ctx.set_materialize_grads(False)
        ctx.p = p
        wide_TD = x_TD.to(a_MD.dtype)
        if places is not None:
            u_TM = with_zeros(wide_TD, places) @ (a_MD / (1 - p)).t()
            return u_TM, None if router_ND is None else wide_TD @ router_ND.t()
        if router_ND is None:
            return wide_TD @ a_MD.t(), None
        both = wide_TD @ torch.cat([a_MD, router_ND]).t()
        return both[:, : a_MD.shape[0]], both[:, a_MD.shape[0] :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Gradients:
        """Gradients of x, A and the router."""
        x_TD, a_MD, router_ND, places = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        wide_TD = x_TD.to(a_MD.dtype)
        u_TM, logits_TN = (
            None if gradient is None else gradient.to(a_MD.dtype) for gradient in gradients
        )  # from here on these names mean the gradients
        if places is not None:
            x, a, router = _masked_gradients(
                wide_TD, a_MD, router_ND, places, ctx.p, u_TM, logits_TN, needs_x
            )
        else:
            x, a, router = _stacked_gradients(wide_TD, a_MD, router_ND, u_TM, logits_TN, needs_x)
        return None if x is None else x.to(x_TD.dtype), a, router, None, None


def _stacked_gradients(
    x_TD: Tensor,
    a_MD: Tensor,
    router_ND: Tensor | None,
    u_TM: Tensor | None,
    logits_TN: Tensor | None,
    needs_x: bool,
) -> Gradients:
    """Gradients of x, A and the router, given those of the projections and the logits; no dropout."""
    parts = [(u_TM, a_MD), (logits_TN, router_ND)]
    given = [(gradient, matrix) for gradient, matrix in parts if gradient is not None and matrix is not None]
    if not given:
        return None, None, None
    if len(given) == 1:
        gradient, matrix = given[0]
    else:
        gradient = torch.cat([part[0] for part in given], dim=1)
        matrix = torch.cat([part[1] for part in given])
    x = gradient @ matrix if needs_x else None
    stacked = gradient.t() @ x_TD
    if len(given) == 2:
        rows = a_MD.shape[0]
        return x, stacked[:rows], stacked[rows:]
    return (x, stacked, None) if u_TM is not None else (x, None, stacked)


def _masked_gradients(
    x_TD: Tensor,
    a_MD: Tensor,
    router_ND: Tensor | None,
    places: Tensor,
    p: float,
    u_TM: Tensor | None,
    logits_TN: Tensor | None,
    needs_x: bool,
) -> Gradients:
    """The same where the experts, and not the router, read x through a dropout mask."""
    x = a = router = None
    if u_TM is not None:
        scaled_TM = u_TM / (1 - p)
        a = scaled_TM.t() @ with_zeros(x_TD, places)
        if needs_x:
            x = product_with_zeros(scaled_TM, a_MD, places)
    if logits_TN is not None and router_ND is not None:
        router = logits_TN.t() @ x_TD
        if needs_x:
            x = logits_TN @ router_ND if x is None else x.addmm_(logits_TN, router_ND)
    return x, a, router


class AddProduct(Function):
    """y + s · h Bᵀ in y's dtype, y with any leading dimensions; keeps h, which is (T, R).

    With `in_place` it writes into y, which nobody else may read, and which must be contiguous and no view.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h_TR: Tensor, b_OR: Tensor, scaling: float, in_place: bool) -> Tensor:
        """The sum, in the shape of y."""
        ctx.save_for_backward(h_TR, b_OR)
        ctx.scaling = scaling
        if in_place:
            ctx.mark_dirty(y)
        y_TO = y.reshape(-1, b_OR.shape[0])
        if y.dtype != h_TR.dtype:
            product_TO = (h_TR @ b_OR.t()).mul_(scaling)
            if in_place:
                y_TO.add_(product_TO)
                return y
            return (y_TO + product_TO).to(y.dtype).view(y.shape)
        if in_place:
            y_TO.addmm_(h_TR, b_OR.t(), alpha=scaling)
            return y
        return torch.addmm(y_TO, h_TR, b_OR.t(), alpha=scaling).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Gradients of y (as it came), h and B."""
        (y,) = gradients
        h_TR, b_OR = ctx.saved_tensors
        y_TO = y.reshape(-1, b_OR.shape[0]).to(b_OR.dtype)
        h = (y_TO @ b_OR).mul_(ctx.scaling) if ctx.needs_input_grad[1] else None
        b = y_TO.t() @ (h_TR * ctx.scaling) if ctx.needs_input_grad[2] else None
        return y, h, b, None, None
