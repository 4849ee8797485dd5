"""The federated room: many clients, one base model, and only what a strategy's `Exchange` names travels.

`exchange` says what travels, `strategies` are values over it, `aggregate` and `robust` are pure, `initial` says where
matrices begin; `wire`, `compress`, `messages`, `faults` and `check` are what stands between two machines; `client`
answers, `home` is its disk, `workbench` its model, `personal` its result, `allowed` what its site lets leave; `rounds`
is the server, with `joining` before it and `server_state` on its disk, which tells `progress` and works over the
interface in `clients` that `engines/` implement (a second floor, as each engine brings its own dependency).
`accounting` counts without running.

Its names are imported on first use, because torch and transformers take seconds and `--help` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from manylora.federated.config import SCHEDULES, FederateConfig

if TYPE_CHECKING:
    from manylora.federated.client import Client, ClientData
    from manylora.federated.clients import Clients, Reply
    from manylora.federated.dealing import client_data, client_for, cut_prompts
    from manylora.federated.engines.local import LocalClients
    from manylora.federated.exchange import Exchange
    from manylora.federated.progress import Progress, Quiet
    from manylora.federated.rounds import Rounds
    from manylora.federated.strategies import STRATEGIES, Strategy, strategy_for
    from manylora.federated.wire import Message, pack, unpack
    from manylora.federated.workbench import Workbench

_HOME = {
    "client": ("Client", "ClientData"),
    "clients": ("Clients", "Reply"),
    "dealing": ("client_data", "client_for", "cut_prompts"),
    "engines.local": ("LocalClients",),
    "exchange": ("Exchange",),
    "progress": ("Progress", "Quiet"),
    "rounds": ("Rounds",),
    "strategies": ("STRATEGIES", "Strategy", "strategy_for"),
    "wire": ("Message", "pack", "unpack"),
    "workbench": ("Workbench",),
}

__all__ = [
    "SCHEDULES",
    "STRATEGIES",
    "Client",
    "ClientData",
    "Clients",
    "Exchange",
    "FederateConfig",
    "LocalClients",
    "Message",
    "Progress",
    "Quiet",
    "Reply",
    "Rounds",
    "Strategy",
    "Workbench",
    "client_data",
    "client_for",
    "cut_prompts",
    "pack",
    "strategy_for",
    "unpack",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"manylora.federated.{module}"), name)
    raise AttributeError(f"module 'manylora.federated' has no attribute {name!r}")
