"""Engines: what carries the messages between the rounds and the clients."""

from manylora.federated.engines.local import LocalClients

__all__ = ["LocalClients"]
