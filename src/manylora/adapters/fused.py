"""The two ends of an adapter as autograd functions that keep and write as little as possible.

Plain autograd would write the base output twice, keep a dropped copy of the input, read the input once for the
experts and again for the router, and add up their gradients in extra passes. What lies between the two ends
(routing weights, the weighted sum) is N·R wide or less and stays plain autograd: there is nothing to save.

Narrow tensors have their tokens *last* here, (M, T): a product with few rows and many columns is up to four times
faster on a CPU than its transpose, and what is weighed and added up per token runs along the memory.

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
    """(A dropout(x)ᵀ, W_g xᵀ): the experts' projections (M, T) and the router's logits (N, T).

    Keeps x itself, in its own dtype, and the places of the mask's zeros. Without dropout one product computes
    both, and one more each of their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, a_MD: Tensor, router_ND: Tensor | None, places: Tensor | None, p: float
    ) -> tuple[Tensor, Tensor | None]:
        """The projections, and the logits where there is a router."""
        ctx.save_for_backward(x_TD, a_MD, router_ND, places)
        ctx.set_materialize_grads(False)
        ctx.p = p
        wide_TD = x_TD.to(a_MD.dtype)
        if places is not None:
            u_MT = (a_MD / (1 - p)) @ with_zeros(wide_TD, places).t()
            return u_MT, None if router_ND is None else router_ND @ wide_TD.t()
        if router_ND is None:
            return a_MD @ wide_TD.t(), None
        both = torch.cat([a_MD, router_ND]) @ wide_TD.t()
        return both[: a_MD.shape[0]], both[a_MD.shape[0] :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Gradients:
        """Gradients of x, A and the router."""
        x_TD, a_MD, router_ND, places = ctx.saved_tensors
        wide_TD = x_TD.to(a_MD.dtype)
        needs_x, needs_a, needs_router = ctx.needs_input_grad[:3]
        if places is None:
            x, a, router = _stacked_gradients(
                wide_TD,
                a_MD,
                router_ND,
                *gradients,
                needs_x=needs_x,
                needs_matrices=needs_a or needs_router,
            )
        else:
            x, a, router = _masked_gradients(
                wide_TD,
                a_MD,
                router_ND,
                *gradients,
                needs_x=needs_x,
                needs_a=needs_a,
                places=places,
                p=ctx.p,
            )
        return None if x is None else x.to(x_TD.dtype), a, router, None, None


def _stacked_gradients(
    x_TD: Tensor,
    a_MD: Tensor,
    router_ND: Tensor | None,
    du_MT: Tensor | None,
    dlogits_NT: Tensor | None,
    *,
    needs_x: bool,
    needs_matrices: bool,
) -> Gradients:
    """Gradients of x, A and the router, given those of the projections and the logits; no dropout."""
    parts = [(du_MT, a_MD), (dlogits_NT, router_ND)]
    given = [(gradient, matrix) for gradient, matrix in parts if gradient is not None and matrix is not None]
    if not given:
        return None, None, None
    gradient, matrix = given[0] if len(given) == 1 else (torch.cat(part) for part in zip(*given, strict=True))
    dx_TD = gradient.t() @ matrix if needs_x else None
    if not needs_matrices:
        return dx_TD, None, None
    stacked = gradient @ x_TD
    if len(given) == 2:
        return dx_TD, stacked[: a_MD.shape[0]], stacked[a_MD.shape[0] :]
    return (dx_TD, None, stacked) if du_MT is None else (dx_TD, stacked, None)


def _masked_gradients(
    x_TD: Tensor,
    a_MD: Tensor,
    router_ND: Tensor | None,
    du_MT: Tensor | None,
    dlogits_NT: Tensor | None,
    *,
    needs_x: bool,
    needs_a: bool,
    places: Tensor,
    p: float,
) -> Gradients:
    """The same where the experts, and not the router, read x through a dropout mask."""
    dx_TD = da_MD = drouter_ND = None
    if du_MT is not None:
        scaled_MT = du_MT / (1 - p)
        if needs_a:
            da_MD = scaled_MT @ with_zeros(x_TD, places)
        if needs_x:
            dx_TD = product_with_zeros(scaled_MT.t(), a_MD, places)
    if dlogits_NT is not None and router_ND is not None:
        drouter_ND = dlogits_NT @ x_TD
        if needs_x and dx_TD is None:
            dx_TD = dlogits_NT.t() @ router_ND
        elif dx_TD is not None:
            dx_TD.addmm_(dlogits_NT.t(), router_ND)
    return dx_TD, da_MD, drouter_ND


class AddProduct(Function):
    """y + s · (B h)ᵀ in y's dtype, y with any leading dimensions; keeps h, which is (R, T).

    With `in_place` it writes into y, which nobody else may read, and which must be contiguous and no view.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h_RT: Tensor, b_OR: Tensor, scaling: float, in_place: bool) -> Tensor:
        """The sum, in the shape of y."""
        ctx.save_for_backward(h_RT, b_OR)
        ctx.scaling = scaling
        if in_place:
            ctx.mark_dirty(y)
        y_TO = y.reshape(-1, b_OR.shape[0])
        if y.dtype != h_RT.dtype:
            product_TO = (h_RT.t() @ b_OR.t()).mul_(scaling)
            if in_place:
                y_TO.add_(product_TO)
                return y
            return (y_TO + product_TO).to(y.dtype).view(y.shape)
        if in_place:
            y_TO.addmm_(h_RT.t(), b_OR.t(), alpha=scaling)
            return y
        return torch.addmm(y_TO, h_RT.t(), b_OR.t(), alpha=scaling).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Gradients of y (as it came), h and B."""
        (dy,) = gradients
        h_RT, b_OR = ctx.saved_tensors
        dy_TO = dy.reshape(-1, b_OR.shape[0]).to(b_OR.dtype)
        dh_RT = (b_OR.t() @ dy_TO.t()).mul_(ctx.scaling) if ctx.needs_input_grad[1] else None
        db_OR = ((h_RT * ctx.scaling) @ dy_TO).t() if ctx.needs_input_grad[2] else None
        return dy, dh_RT, db_OR, None, None
