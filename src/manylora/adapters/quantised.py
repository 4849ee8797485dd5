"""Quantised base layers whose weights must stay readable and differentiable."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from manylora.errors import ModelError

_REPACKS = "support_avx512bf16_for_cpu"
_IS_PACKED = "packing_format_for_cpu"


def keep_plain_layout(model: nn.Module) -> None:
    """Have bitsandbytes' 4-bit layers on CPU keep their weights as they were quantised.

    On processors with AVX512-BF16, bitsandbytes (0.50) lays a 4-bit weight out anew at the first forward in
    evaluation mode. From then on the layer passes no gradient to its input, in training too, and PEFT reads the
    weight as if it had the old layout, so that merging destroys it: both silently. Such a layer is slower for
    inference on CPU without the new layout; one that has it already gets the old one back.

    Raises:
        ModelError: a layer has the new layout, and this bitsandbytes cannot undo it.
    """
    for name, module in model.named_modules():
        if not getattr(module, _REPACKS, False):
            continue
        setattr(module, _REPACKS, False)
        weight: Any = module.weight
        if getattr(getattr(weight, "quant_state", None), _IS_PACKED, False):
            functional = importlib.import_module("bitsandbytes.functional")
            undo = getattr(functional, "_convert_weight_packed_for_cpu_inverse", None)
            if undo is None:
                raise ModelError(
                    f"{name!r} has run before it was adapted, and its 4-bit weight has been laid out for "
                    "inference; load the model anew and adapt it before its first forward."
                )
            weight.data, weight.quant_state = undo(weight.data, weight.quant_state)
