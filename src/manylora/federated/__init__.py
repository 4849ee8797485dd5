"""The federated room: many clients, one base model, and only what a strategy names travels.

`parts` is the table of what a client's model consists of; `strategy` is what a way to learn together has to be, and
`strategies` (`flora`) those that there are, over the pure `aggregate` and `robust`; `wire`, `compress`, `messages`,
`faults` and `check` are what stands between two machines; `client` answers, `home` is its disk, `private` what it keeps
there, `workbench` its model, `personal` its result, `allowed` what its site lets leave; `rounds` is the server, with
`joining` before it and `server_state` on its disk, which tells `progress` and works over the interface in `clients`
that `engines/` implement (a second floor, as each engine brings its own dependency). `kept` says what a state on either
disk must hold. `accounting` counts without running.

Its names are imported on first use, because torch and transformers take seconds and `--help` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from manylora.federated.config import FederateConfig

if TYPE_CHECKING:
    from manylora.federated.client import Client
    from manylora.federated.clients import Clients, Reply
    from manylora.federated.dealing import client_data
    from manylora.federated.engines.local import LocalClients
    from manylora.federated.personal import ClientData, cut_prompts
    from manylora.federated.progress import RoundsDisplay
    from manylora.federated.rounds import Rounds
    from manylora.federated.strategy import Strategy
    from manylora.federated.wire import Message, pack, unpack
    from manylora.federated.workbench import Workbench

_HOME = {
    "client": ("Client",),
    "clients": ("Clients", "Reply"),
    "dealing": ("client_data",),
    "engines.local": ("LocalClients",),
    "personal": ("ClientData", "cut_prompts"),
    "progress": ("RoundsDisplay",),
    "rounds": ("Rounds",),
    "strategy": ("Strategy",),
    "wire": ("Message", "pack", "unpack"),
    "workbench": ("Workbench",),
}

__all__ = [
    "Client",
    "ClientData",
    "Clients",
    "FederateConfig",
    "LocalClients",
    "Message",
    "Reply",
    "Rounds",
    "RoundsDisplay",
    "Strategy",
    "Workbench",
    "client_data",
    "cut_prompts",
    "pack",
    "unpack",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"manylora.federated.{module}"), name)
    raise AttributeError(f"module 'manylora.federated' has no attribute {name!r}")
