"""The load-balance loss of token routers: what the routers decided, and where the loss goes.

Shape letters: T tokens (any leading dimensions), N experts.

A router's logits leave the layer as they are, with their graph and without a further operation: under gradient
checkpointing a layer's rerun must do exactly what its first run did. The loss is computed when the call of the
model is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.routes import CallFacts
from manylora.errors import RoutingError


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class RouterCall:
    """One adapter's router in one layer, in one call of the model."""

    adapter: str
    """Name of the adapter."""
    logits: Tensor
    """(…, N), before temperature and softmax."""
    mask: Tensor | None
    """(…), nonzero where a token is real; None: all are."""
    top_k: int | None
    temperature: float
    weight: float
    """The adapter's `load_balance_weight`."""


class LoadBalance:
    """The routers' calls of one or several forwards, and their loss.

    Args:
        calls: what has been collected already.
    """

    def __init__(self, calls: list[RouterCall] | None = None) -> None:
        self.calls: list[RouterCall] = [] if calls is None else calls

    def loss(self) -> Tensor:
        """`load_balance_weight` × the loss, averaged over an adapter's layers, added up over the active adapters.

        The mean over layers, where Switch adds them up: so the weight means the same in a model with 4 adapted
        layers and one with 224. A scalar, 0 where nothing was collected.
        """
        terms: dict[str, list[Tensor]] = {}
        for call in self.calls:
            term = load_balance_loss(
                call.logits, mask_T=call.mask, top_k=call.top_k, temperature=call.temperature
            )
            terms.setdefault(call.adapter, []).append(call.weight * term.to(self.calls[0].logits.device))
        return torch.stack(
            [torch.stack(of_one).mean() for of_one in terms.values()] or [torch.zeros(())]
        ).sum()


def load_balance_loss(
    logits_TN: Tensor, *, mask_T: Tensor | None = None, top_k: int | None = None, temperature: float = 1.0
) -> Tensor:
    """N · Σ_n f_n P_n (Switch Transformer, 2101.03961, equations 4 to 6): 1 when balanced, N when collapsed.

    f_n is the share of choices that fall on expert n (a token chooses its `top_k` experts, one where all count),
    P_n the mean of softmax(logits / temperature); only P carries a gradient. Computed in float32 at least.

    Args:
        logits_TN: the router's logits, (…, N).
        mask_T: nonzero where a token counts, (…); None: all do.
        top_k: experts a token chooses.
        temperature: of the softmax.
    """
    n = logits_TN.shape[-1]
    wide = torch.promote_types(logits_TN.dtype, torch.float32)
    flat_TN = logits_TN.to(wide).reshape(-1, n)
    probabilities_TN = torch.softmax(flat_TN / temperature, dim=-1)
    k = top_k or 1
    chosen_TN = torch.zeros_like(flat_TN).scatter(-1, flat_TN.detach().topk(k, dim=-1).indices, 1 / k)
    if mask_T is None:
        counted_T1 = torch.ones_like(flat_TN[:, :1])
    else:
        counted_T1 = (mask_T.reshape(-1, 1).to(flat_TN.device) != 0).to(wide)
    total = counted_T1.sum().clamp(min=1)
    f_N, p_N = (chosen_TN * counted_T1).sum(0) / total, (probabilities_TN * counted_T1).sum(0) / total
    return n * (f_N * p_N).sum()


def add_to_loss(output: Any, terms: LoadBalance, call: CallFacts) -> Any:
    """The model's output with the load-balance loss added to its own loss.

    Where the call knows how many labels the whole optimizer step has (transformers' Trainer says so), this
    call's part of them is its weight: over the micro-batches of a step the weights add up to 1.

    Raises:
        RoutingError: the output holds no loss.
    """
    extra = terms.loss()
    if call.items is not None and isinstance(call.labels, Tensor):
        extra = extra * ((call.labels != -100).sum() / call.items)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        output.loss = loss + extra.to(loss.device, loss.dtype)
        return output
    if call.labels is not None and isinstance(output, tuple) and output and output[0].dim() == 0:
        return (output[0] + extra.to(output[0].device, output[0].dtype), *output[1:])
    raise RoutingError(
        f"load_balance_weight={terms.calls[0].weight:g}, but the model's output has no loss to add it to: pass "
        "labels, or call the model inside `with model.load_balance() as balance:` and add balance.loss()."
    )
