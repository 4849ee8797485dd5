"""Adapters: the multi-LoRA layer as a PEFT method.

`config` holds the settings, `ops` the mathematics, `layer` the adapted linear layer, `factored` the bank of a
federated client with a rank of its own, `routing` how expert ids
reach it, `targets` which layers get one, `model` PEFT's tuner, `card` the model card's lines on loading;
`registration` tells PEFT about the method when this room is imported.
"""

from manylora.adapters.config import (
    FORMAT_VERSION,
    ManyLoraConfig,
    ManyLoraType,
    RouterKind,
    Share,
    parameters_per_layer,
)
from manylora.adapters.factored import FactoredBank
from manylora.adapters.layer import ExpertBank, ManyLoraLinear
from manylora.adapters.model import ManyLoraModel
from manylora.adapters.registration import register
from manylora.adapters.routing import ExpertIds

register()

__all__ = [
    "FORMAT_VERSION",
    "ExpertBank",
    "ExpertIds",
    "FactoredBank",
    "ManyLoraConfig",
    "ManyLoraLinear",
    "ManyLoraModel",
    "ManyLoraType",
    "RouterKind",
    "Share",
    "parameters_per_layer",
]
