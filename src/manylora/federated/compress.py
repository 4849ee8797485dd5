"""What a client sends up, made smaller: the lighter form of a product, and error feedback.

Where a wire format rounds, the sender keeps what rounding took away and adds it to its next message (error
feedback; Seide et al. 2014, Karimireddy et al. 2019, arXiv 1901.09847), so that over the rounds nothing is lost.

Shape letters: O out, R the intermediate rank, K the client's rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manylora.errors import AnswerError
from manylora.federated.exchange import UPDATE, State, split_name


def product_is_lighter(*, out_features: int, rank: int, own_rank: int) -> bool:
    """Whether B2 B1 (O, R) has fewer numbers than B2 (O, K) and B1 (K, R) together (method.md)."""
    return out_features * rank < own_rank * (out_features + rank)


def corrected(values: State, residual: State) -> dict[str, Tensor]:
    """`values` with what earlier messages lost."""
    return {name: value + residual[name] if name in residual else value for name, value in values.items()}


def residual_of(values: State, sent: State) -> dict[str, Tensor]:
    """What the receiver of `sent` does not know of `values`."""
    return {name: value - sent[name] for name, value in values.items()}


def lightest(values: State, *, own_rank: int, factors: State | None = None) -> dict[str, Tensor]:
    """Every product dB (O, R) as its two factors B2 and B1 where they are lighter; all else as it is.

    Args:
        values: what leaves the client.
        own_rank: K.
        factors: the state whose B2 and B1 are the factors. Default: they are found anew, the best of rank K by SVD,
            as a product that was corrected may have a larger rank.
    """
    light: dict[str, Tensor] = {}
    for name, value in values.items():
        layer, part = split_name(name)
        if part != UPDATE or product_is_lighter(
            out_features=value.shape[0], rank=value.shape[1], own_rank=own_rank
        ):
            light[name] = value
        elif factors is not None:
            light[f"{layer}.B2"], light[f"{layer}.B1"] = factors[f"{layer}.B2"], factors[f"{layer}.B1"]
        else:
            light[f"{layer}.B2"], light[f"{layer}.B1"] = _best_factors(value, own_rank)
    return light


def expanded(sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `lightest`: factors back to products, by the same arithmetic at both ends.

    Raises:
        AnswerError: one factor without the other, beside the product, or of shapes that do not multiply.
    """
    values = {name: value for name, value in sent.items() if split_name(name)[1] not in ("B2", "B1")}
    layers = {split_name(name)[0] for name in sent if split_name(name)[1] in ("B2", "B1")}
    for layer in sorted(layers):
        b2, b1 = sent.get(f"{layer}.B2"), sent.get(f"{layer}.B1")
        name = f"{layer}.{UPDATE}"
        if b2 is None or b1 is None or name in values or b2.shape[1] != b1.shape[0]:
            raise AnswerError(f"its factors of {name} do not belong together")
        values[name] = (b2.double() @ b1.double()).float()
    return values


def _best_factors(product_OR: Tensor, own_rank: int) -> tuple[Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(product_OR.double(), full_matrices=False)
    root = s.sqrt()
    b2 = product_OR.new_zeros(product_OR.shape[0], own_rank)
    b1 = product_OR.new_zeros(own_rank, product_OR.shape[1])
    kept = min(own_rank, len(s))
    b2[:, :kept] = (u * root)[:, :kept]
    b1[:kept] = (root[:, None] * vt)[:kept]
    return b2, b1
