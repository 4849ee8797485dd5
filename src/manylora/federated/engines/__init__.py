"""Engines: what carries the messages between the rounds and the clients.

`local` is the one in this process; `flower`, for clients on machines of their own, stands on `flower_link` (the
server's connection, with the limits in `flower_runtime`), `flower_node` (a client's), `flower_private` (what of Flower
is not documented) and `flower_recipe` (how an operator starts them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.federated.engines.local import LocalClients

__all__ = ["LocalClients"]


def __getattr__(name: str) -> Any:  # torch takes seconds, and what carries bytes needs none of it
    if name == "LocalClients":
        from manylora.federated.engines.local import LocalClients

        return LocalClients
    raise AttributeError(f"module 'manylora.federated.engines' has no attribute {name!r}")
