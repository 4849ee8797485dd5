"""The engine in one process: one base in memory, the clients take turns on it, their state waits on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from manylora.federated.client import Client, ClientData
from manylora.federated.clients import Reply
from manylora.federated.workbench import Workbench


class LocalClients:
    """Simulated clients. Memory holds one base and one adapter, however many they are.

    Args:
        data: client name to its rows.
        home: folder of the clients' private state.
        bench: the base model.
    """

    def __init__(self, data: Mapping[str, ClientData], *, home: Path, bench: Workbench) -> None:
        self.data, self.home, self.bench = data, home, bench

    def names(self) -> Sequence[str]:
        """Every client."""
        return list(self.data)

    def ask(
        self, names: Sequence[str], message: Callable[[str], bytes], *, seconds: float | None
    ) -> Iterator[Reply]:
        """One after the other; after `seconds` the others are not asked any more."""
        began = time.monotonic()
        for name in names:
            if seconds is not None and time.monotonic() - began > seconds:
                return
            client = Client(name, self.data[name], home=self.home, bench=self.bench)
            yield Reply(client=name, data=client.handle(message(name)))
