"""Sums that a few clients cannot carry off: pure functions over the clients' changes, like `aggregate`.

Off by default. They hold against some hostile clients of many; none of them knows a hostile client from an honest one
whose rows are unlike the others', and what that costs was measured (docs/federated.md).

- `clip`: no change counts for more than a multiple of the median norm (norm thresholding: Sun et al. 2019,
  arXiv 1911.07963, section 5; the bound there is a number, here it follows the round's clients).
- `trimmed-mean`, `median`: number by number over the clients (Yin et al. 2018, arXiv 1803.01498, definitions 1 and 2),
  every client alike: a weight by examples would hand the decision to whoever claims the most.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from manylora.federated.config import FederateConfig
from manylora.federated.parts import UPDATE, State, norm, split_name

Change = dict[str, Tensor]
"""Name of a shared matrix to its change, float64."""


def changes_of(received: State, answers: Sequence[State]) -> list[Change]:
    """What each client would change of the shared state.

    Args:
        received: the shared state that all got.
        answers: the parts that came up: a client's own values of the shared matrices, or products "dB", which are
            changes of B0 already.
    """
    return [
        {
            name: answer[product].double()
            if (product := f"{split_name(name)[0]}.{UPDATE}") in answer
            else answer[name].double() - value.double()
            for name, value in received.items()
        }
        for answer in answers
    ]


def robust_change(
    changes: Sequence[Change], weights: Sequence[float], config: FederateConfig
) -> tuple[Change, list[float]]:
    """The change of the shared state by the run's rule, and what each client has of it.

    All changes are in memory at once.

    Args:
        changes: of the clients that count.
        weights: p_k, Σ p_k = 1.
        config: of the run; its `robust` is not "none".

    Returns:
        The change, and for each client the norm of the part of it that is its own.
    """
    if config.robust == "clip":
        return clipped_mean(changes, weights, multiple=config.clip)
    cut = (len(changes) - 1) // 2  # all but the middle one, or the two
    if config.robust == "trimmed-mean":
        cut = min(cut, max(1, math.floor(config.trim * len(changes))))
    return trimmed_mean(changes, cut=cut)


def clipped_mean(
    changes: Sequence[Change], weights: Sequence[float], *, multiple: float
) -> tuple[Change, list[float]]:
    """Σ p_k min(1, c / ‖u_k‖) u_k, where c is `multiple` times the median of the norms ‖u_k‖.

    Where half of the clients changed nothing c is 0, and so is the sum: what the others sent is the minority's.
    """
    norms = [norm(change) for change in changes]
    bound = multiple * statistics.median(norms)
    factors = [
        weight * min(1.0, bound / size) if size else weight
        for weight, size in zip(weights, norms, strict=True)
    ]
    total = {name: torch.zeros_like(value) for name, value in changes[0].items()}
    for factor, change in zip(factors, changes, strict=True):
        for name, sum_ in total.items():
            sum_.add_(change[name], alpha=factor)
    return total, [factor * size for factor, size in zip(factors, norms, strict=True)]


def trimmed_mean(changes: Sequence[Change], *, cut: int) -> tuple[Change, list[float]]:
    """Of every number the mean over the clients without its `cut` smallest and `cut` largest values."""
    kept = len(changes) - 2 * cut
    total: Change = {}
    squares = torch.zeros(len(changes), dtype=torch.float64)
    for name in changes[0]:
        values_KOR = torch.stack([change[name] for change in changes])
        order_KOR = values_KOR.argsort(dim=0, stable=True)[cut : len(changes) - cut]
        within_KOR = torch.zeros_like(values_KOR).scatter_(0, order_KOR, 1 / kept)
        part_KOR = values_KOR * within_KOR
        total[name] = part_KOR.sum(0)
        squares += part_KOR.square().flatten(1).sum(1)
    return total, squares.sqrt().tolist()


def shares_of(parts: Sequence[float]) -> list[float]:
    """What each client has of a round's change: its part's norm among the sum of all; 0 where nothing changed."""
    total = math.fsum(parts)
    return [part / total if total else 0.0 for part in parts]
