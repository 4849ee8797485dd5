"""Dropout that keeps the places of the zeros instead of a second copy of the input.

Drawing one random number per element is what dropout costs (on a CPU three times the product with A). The gaps
between the zeros of a Bernoulli mask are geometric, so one number per *zero* draws the very same mask: at
p = 0.05 a twentieth of the numbers. The places are also the smallest record of the mask that can be applied
again without unpacking it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_drops(x: Tensor, p: float) -> Tensor:
    """Places of the elements that a dropout mask over `x` sets to zero, each with probability p by itself.

    Draws from torch's default generator of the device, so `torch.manual_seed` and checkpointing's restored
    state give the same mask again.

    Args:
        x: the tensor to be masked; only its size and device are looked at.
        p: probability of a zero, in (0, 1).

    Returns:
        Increasing places in the flattened `x`. Its length depends on the size of `x` and on p alone; what is
        left over stands at `x.numel()`, one behind the last element.
    """
    size = x.numel()
    # Enough gaps to reach the end but for 1 in 10^15 draws (eight standard deviations); never more than needed.
    count = min(size, math.ceil(size * p + 8 * math.sqrt(size * p * (1 - p)) + 16))
    uniform = torch.rand(count, device=x.device, dtype=torch.float32)
    gaps = uniform.neg_().log1p_().div_(math.log1p(-p)).floor_()  # P(gap = k) = p (1 - p)^k, k = 0, 1, …
    places = gaps.to(torch.int64).add_(1).cumsum(0).sub_(1).clamp_(max=size)
    return places.to(torch.int32) if size < 2**31 - 1 else places


def with_zeros(x: Tensor, places: Tensor) -> Tensor:
    """A copy of `x` with zeros at `places` (from `draw_drops`), not yet scaled by 1 / (1 - p)."""
    room, copy = _room_for(x.shape, like=x)
    copy.copy_(x)
    return _put_zeros(room, places, copy)


def product_with_zeros(left: Tensor, right: Tensor, places: Tensor) -> Tensor:
    """The matrix product with zeros at `places`, not yet scaled."""
    room, product = _room_for((left.shape[0], right.shape[1]), like=left)
    torch.mm(left, right, out=product)
    return _put_zeros(room, places, product)


def dropped_out(x: Tensor, places: Tensor, p: float) -> Tensor:
    """Dropout by plain operations that autograd knows: zeros at `places`, the rest scaled by 1 / (1 - p)."""
    room = torch.cat([x.reshape(-1), x.new_zeros(1)]).index_fill(0, places.long(), 0)
    return room[:-1].view(x.shape) / (1 - p)


def _room_for(shape: tuple[int, ...] | torch.Size, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Memory with one element to spare, where the places that were left over may point; and the view to fill."""
    size = math.prod(shape)
    room = like.new_empty(size + 1)
    return room, room[:size].view(shape)


def _put_zeros(room: Tensor, places: Tensor, view: Tensor) -> Tensor:
    room.index_fill_(0, places.long(), 0)
    return view
