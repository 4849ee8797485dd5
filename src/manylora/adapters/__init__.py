"""Adapters: the multi-LoRA layer as a PEFT method.

`config` holds the settings, `ops` the mathematics (`fused` its autograd functions, `dropout` their mask), `layer` the
adapted linear layer, `bank` what an adapter adds to it, `layout` which matrices are shared, `routes` what one call says
about routing, `routing` how that reaches the layers, `mixed` several adapters in one batch, `balance` the load-balance
loss, `gates` statistics, `targets` which layers get one, `model` the tuner, which PEFT is told of when this room is
imported, `card` the lines on loading in model cards. `export` makes plain LoRAs of an adapter (`collapse`: where it has
a token router), `from_lora` an adapter of plain LoRAs, `folders` reads and writes both, `arrival` sees that what was
read is what the model then has.
"""

from manylora.adapters.arrival import check_finite, check_result, loading, put_weights
from manylora.adapters.balance import LoadBalance, load_balance_loss
from manylora.adapters.bank import Bank, ExpertBank, FactoredBank
from manylora.adapters.collapse import Collapse, Fitted, How
from manylora.adapters.config import (
    FORMAT_VERSION,
    ManyLoraConfig,
    ManyLoraType,
    RouterKind,
)
from manylora.adapters.export import PlainLora, expert_names, export_lora
from manylora.adapters.folders import (
    check_folder,
    find_loras,
    read_adapter,
    read_any,
    read_lora,
    read_settings,
    read_weights,
    write_folder,
)
from manylora.adapters.from_lora import import_loras
from manylora.adapters.gates import (
    COLLAPSED_ABOVE,
    GateStatistics,
    LayerGates,
    gate_statistics,
    has_load_balance,
    load_balance,
)
from manylora.adapters.layer import ManyLoraLinear
from manylora.adapters.layout import Layout, Share
from manylora.adapters.model import ManyLoraModel, register
from manylora.adapters.routes import ExpertIds
from manylora.adapters.targets import check_expressions

register()

__all__ = [
    "COLLAPSED_ABOVE",
    "FORMAT_VERSION",
    "Bank",
    "Collapse",
    "ExpertBank",
    "ExpertIds",
    "FactoredBank",
    "Fitted",
    "GateStatistics",
    "How",
    "LayerGates",
    "Layout",
    "LoadBalance",
    "ManyLoraConfig",
    "ManyLoraLinear",
    "ManyLoraModel",
    "ManyLoraType",
    "PlainLora",
    "RouterKind",
    "Share",
    "check_expressions",
    "check_finite",
    "check_folder",
    "check_result",
    "expert_names",
    "export_lora",
    "find_loras",
    "gate_statistics",
    "has_load_balance",
    "import_loras",
    "load_balance",
    "load_balance_loss",
    "loading",
    "put_weights",
    "read_adapter",
    "read_any",
    "read_lora",
    "read_settings",
    "read_weights",
    "write_folder",
]
