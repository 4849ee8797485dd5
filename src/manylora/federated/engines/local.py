"""The engine in one process: one base in memory, the clients take turns on it, their state waits on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from manylora.federated.client import Client
from manylora.federated.clients import Reply
from manylora.federated.personal import ClientData
from manylora.federated.private import check_version
from manylora.federated.workbench import Workbench


class LocalClients:
    """Simulated clients. Memory holds one base and one adapter, however many they are.

    Args:
        data: client name to its rows.
        home: folder of the clients' private state.
        bench: the base model.
        say: told, in a line, why a client could not answer; the server hears only a code, as it would from afar.
    """

    def __init__(
        self,
        data: Mapping[str, ClientData],
        *,
        home: Path,
        bench: Workbench,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.data, self.home, self.bench, self.say = data, home, bench, say

    def names(self) -> Sequence[str]:
        """Every client."""
        return list(self.data)

    def examples(self, name: str) -> int | None:
        """Training rows of a client."""
        return sum(map(len, self.data[name].train.values()))

    def check_states(self, versions: Mapping[str, int]) -> None:
        """Read the private state that each client would go on from.

        Args:
            versions: client to the last round in which its answer counted.

        Raises:
            MissingStateError, DamagedStateError: one is not there, or not as it was written.
        """
        for name in versions.keys() & self.data.keys():
            check_version(self._client(name).private, versions[name], bench=self.bench)

    def ask(
        self, names: Sequence[str], message: Callable[[str], bytes], *, seconds: float | None, most: int
    ) -> Iterator[Reply]:
        """One after the other; after `seconds` the others are not asked any more."""
        began = time.monotonic()
        for name in names:
            if seconds is not None and time.monotonic() - began > seconds:
                return
            yield Reply(client=name, data=self._client(name).handle(message(name)))

    def _client(self, name: str) -> Client:
        return Client(name, self.data[name], home=self.home, bench=self.bench, say=self.say)
