"""Muon in float32, matrices of one shape together (torch's own casts to bfloat16, which most CPUs emulate slowly).

Momentum, then the update is replaced by (nearly) the closest orthogonal matrix through a Newton-Schulz iteration.
Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale 0.2 sqrt(max side)
that fits AdamW's learning rates is of Liu et al., arXiv 2502.16982, section 2.2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix_MAB: torch.Tensor, iterations: int = 4) -> torch.Tensor:
    """Newton-Schulz for a stack of matrices (M, A, B): singular values pulled towards 1."""
    a, b, c = COEFFICIENTS
    tall = matrix_MAB.shape[-2] > matrix_MAB.shape[-1]
    x = matrix_MAB.mT if tall else matrix_MAB
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For two-dimensional parameters only."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)
