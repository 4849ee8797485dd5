"""Aggregation: state dicts in, state dict out; no engine, no disk, no client.

Every function takes what the clients received, and the answers that count as (p_k, state) with Σ p_k = 1. Sums
run in float64 in the order given, one answer at a time: the caller gives them sorted by client, and the result
does not depend on the order in which they arrived, nor memory on their number (FLoRA's stack apart).

torch is imported where it is used, as the strategies' names, which stand above these in `--help`, must not wait for it.

Shape letters: D in, O out, R the shared rank, K_k a client's rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from manylora.federated.parts import UPDATE, State, component_axis, split_name

if TYPE_CHECKING:
    from torch import Tensor
Answers: TypeAlias = "Iterable[tuple[float, State]]"


def mean(received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
    """Σ p_k X_k for every matrix X that travels: Fed-ALoRA (X = B, arXiv 2509.25414, section 4.2), FedSA-LoRA
    (X = A, 2410.01463), FedIT (both apart, 2305.05644), FFA-LoRA (X = B, 2403.12313).
    """
    import torch

    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in received.items()}
    for weight, state in answers:
        for name, sum_ in total.items():
            sum_.add_(state[name].double(), alpha=weight)
    return _narrow(total)


def increment(received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
    """B0 + Σ p_k B2_k B1_k: Fed-ALoRA with unequal ranks (2509.25414, section 4.3). "dB" holds the products."""
    total = {name: value.double() for name, value in received.items()}
    for weight, state in answers:
        for name, sum_ in total.items():
            sum_.add_(state[f"{split_name(name)[0]}.{UPDATE}"].double(), alpha=weight)
    return _narrow(total)


def padded_mean(received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
    """Pad A_k (K_k, D) and B_k (O, K_k) with zeros to the largest rank, then average (2401.06432, without its
    pruning and weighting).
    """
    import torch

    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in received.items()}
    for weight, state in answers:
        for name, sum_ in total.items():
            value = state[name].double()
            sum_[: value.shape[0], : value.shape[1]].add_(value, alpha=weight)
    return _narrow(total)


def stacked(received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
    """[p_k s B_k] side by side and [A_k] one above the other: their product is Σ p_k s B_k A_k (2409.05976)."""
    import torch

    columns: dict[str, list[Tensor]] = {}
    for weight, state in answers:
        for name in sorted(state):
            value = state[name].double()
            is_b = split_name(name)[1] == "B"
            columns.setdefault(name, []).append(value * (weight * scaling) if is_b else value)
    return _narrow({name: torch.cat(parts, dim=component_axis(name)) for name, parts in columns.items()})


def svd_of_mean(received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
    """The best factors of Σ p_k s B_k A_k at the largest rank R, by SVD (2402.11505).

    s B A is the sum's best approximation of rank R, with the singular values split evenly between B and A;
    the first K rows and columns are the best approximation of rank K, so a client truncates.
    """
    import torch

    layers = sorted({split_name(name)[0] for name in received})
    total = {
        layer: torch.zeros(
            received[f"{layer}.B"].shape[0], received[f"{layer}.A"].shape[1], dtype=torch.float64
        )
        for layer in layers
    }
    for weight, state in answers:
        for layer, sum_ in total.items():
            b_OK, a_KD = state[f"{layer}.B"].double(), state[f"{layer}.A"].double()
            sum_.addmm_(b_OK, a_KD, alpha=weight * scaling)
    factors: dict[str, Tensor] = {}
    for layer, delta_OD in total.items():
        rank = received[f"{layer}.A"].shape[0]
        u, s, vt = torch.linalg.svd(delta_OD, full_matrices=False)
        root = (s / scaling).sqrt()
        a_RD = delta_OD.new_zeros(rank, delta_OD.shape[1])
        b_OR = delta_OD.new_zeros(delta_OD.shape[0], rank)
        kept = min(rank, len(s))
        a_RD[:kept] = root[:kept, None] * vt[:kept]
        b_OR[:, :kept] = u[:, :kept] * root[:kept]
        factors |= {f"{layer}.A": a_RD, f"{layer}.B": b_OR}
    return _narrow(factors)


def _narrow(state: State) -> dict[str, Tensor]:
    return {name: state[name].float() for name in sorted(state)}
