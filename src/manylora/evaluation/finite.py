"""A model whose output is not a number is refused by the cause: a weight of its own, or a processor's bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manylora.errors import NonFiniteError

BFLOAT16_ON_CPU = (
    "On a CPU with AMX, bfloat16 can take NaN from other memory: give --dtype float32, or set "
    "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment."
)
"""oneDNN's product reads beyond the columns of a matrix whose number is no multiple of 32, and multiplies what it finds
there by zero (its issue 5717, mended by pull request 5723 in August 2026; torch 2.13 has the older one)."""
SHOWN = 3
"""Rows that an error names."""


def broken_weight(model: torch.nn.Module) -> str:
    """A sentence on the first weight of a model that is not finite; empty where all are."""
    for name, parameter in model.named_parameters():
        # torch cannot ask float8 whether it is finite
        if (
            parameter.is_floating_point()
            and parameter.itemsize > 1
            and not bool(parameter.detach().isfinite().all())
        ):
            short = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            return (
                f"The model's weight {short!r} itself holds such values; take another copy of the base model, or "
                "leave out the rows that use them."
            )
    return ""


def in_bfloat16_on_cpu(model: torch.nn.Module) -> bool:
    """Whether a model computes in a type that some CPUs get wrong."""
    return any(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in model.parameters())


def check_output(model: torch.nn.Module, logits: Tensor, mask_BT: Tensor, what: str) -> None:
    """Refuse logits that are NaN where something was read.

    Args:
        model: whose they are.
        logits: (B, T, V), or a classifier's (B, C).
        mask_BT: which tokens are no padding, whose logits mean nothing.
        what: was read, for the error.

    Raises:
        NonFiniteError: some are.
    """
    bad = logits.isnan().any(-1)
    if bool((bad if bad.dim() == 1 else bad & mask_BT.bool()).any()):
        refuse_output(model, [what])


def refuse_output(model: torch.nn.Module, origins: Sequence[str]) -> None:
    """Say that a model's output is not finite.

    Args:
        model: whose output it is.
        origins: where the rows come from.

    Raises:
        NonFiniteError: always.
    """
    cause = broken_weight(model) or (
        BFLOAT16_ON_CPU if in_bfloat16_on_cpu(model) else "Give --dtype float32, or leave these rows out."
    )
    more = len(origins) - SHOWN
    shown = ", ".join(origins[:SHOWN]) + (f" and {more} more" if more > 0 else "")
    raise NonFiniteError(f"The model's output for {shown} is not a number (NaN). {cause}")
