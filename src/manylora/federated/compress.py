"""What a client sends up, made smaller: a product as its factors, and error feedback.

Where a wire format rounds, the sender keeps what rounding took away and adds it to its next message (error
feedback; Seide et al. 2014, Karimireddy et al. 2019, arXiv 1901.09847), so that over the rounds nothing is lost.

Shape letters: O out, R the intermediate rank, K the client's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.errors import AnswerError
from manylora.federated.parts import PARTS, UPDATE, State, sent_as, split_name

_FACTORS = PARTS[UPDATE].factors or ()


def corrected(values: State, residual: State) -> dict[str, Tensor]:
    """`values` with what earlier messages lost."""
    return {name: value + residual[name] if name in residual else value for name, value in values.items()}


def residual_of(values: State, sent: State) -> dict[str, Tensor]:
    """What the receiver of `sent` does not know of `values`."""
    return {name: value - sent[name] for name, value in values.items()}


def factor_products(values: State, *, own_rank: int, factors: State | None = None) -> dict[str, Tensor]:
    """Every product dB (O, R) as its two factors B2 and B1 where they have fewer numbers; all else as it is.

    Args:
        values: what leaves the client.
        own_rank: K.
        factors: the state whose B2 and B1 are the factors. Default: they are found anew, the best of rank K by SVD,
            as a product that was corrected may have a larger rank.
    """
    light: dict[str, Tensor] = {}
    for name, value in values.items():
        layer, part = split_name(name)
        form = sent_as(part, layer=(value.shape[0], 0), rank=own_rank, intermediate=value.shape[1])
        if form == (part,):
            light[name] = value
        elif factors is not None:
            light |= {f"{layer}.{factor}": factors[f"{layer}.{factor}"] for factor in form}
        else:
            pair = zip(form, _best_factors(value, own_rank), strict=True)
            light |= {f"{layer}.{factor}": matrix for factor, matrix in pair}
    return light


def multiply_factors(sent: State) -> dict[str, Tensor]:
    """Undo `factor_products`, by the same arithmetic at both ends.

    Raises:
        AnswerError: one factor without the other, beside the product, or of shapes that do not multiply.
    """
    values = {name: value for name, value in sent.items() if split_name(name)[1] not in _FACTORS}
    for layer in sorted({split_name(name)[0] for name in sent.keys() - values.keys()}):
        b2, b1 = (sent.get(f"{layer}.{factor}") for factor in _FACTORS)
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
