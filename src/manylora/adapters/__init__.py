"""Adapters: the multi-LoRA layer as a PEFT method.

`config` holds the settings, `ops` the mathematics, `layer` the adapted linear layer, `routes` what one call says
about routing, `routing` how that reaches the layers, `mixed` several adapters in one batch, `balance` the
load-balance loss, `gates` statistics, `targets` which layers get one, `model` PEFT's tuner, `card` the model card's
lines on loading; `registration` tells PEFT about the method when this room is imported.
"""

from manylora.adapters.balance import LoadBalance, load_balance_loss
from manylora.adapters.config import (
    FORMAT_VERSION,
    ManyLoraConfig,
    ManyLoraType,
    RouterKind,
    Share,
    parameters_per_layer,
)
from manylora.adapters.gates import (
    COLLAPSE,
    GateStatistics,
    LayerGates,
    gate_statistics,
    has_load_balance,
    load_balance,
)
from manylora.adapters.layer import ExpertBank, ManyLoraLinear
from manylora.adapters.model import ManyLoraModel
from manylora.adapters.registration import register
from manylora.adapters.routes import ExpertIds

register()

__all__ = [
    "COLLAPSE",
    "FORMAT_VERSION",
    "ExpertBank",
    "ExpertIds",
    "GateStatistics",
    "LayerGates",
    "LoadBalance",
    "ManyLoraConfig",
    "ManyLoraLinear",
    "ManyLoraModel",
    "ManyLoraType",
    "RouterKind",
    "Share",
    "gate_statistics",
    "has_load_balance",
    "load_balance",
    "load_balance_loss",
    "parameters_per_layer",
]
