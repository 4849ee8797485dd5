"""The interface between the rounds and an engine: all that an engine has to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back from one client: bytes, or why there are none."""

    client: str
    data: bytes | None = None
    reason: str = ""
    """In the engine's own words; a client's words stay with it (`manylora.federated.faults`)."""


class Clients(Protocol):
    """Clients that can be asked. The messages are bytes from `manylora.federated.wire`; engines only carry them.

    At the other end `Client.handle` turns a message into its answer. A client's answer is a function of the
    message and its disk, so an engine may deliver a message again, as after a restart of the client.
    """

    def names(self) -> Sequence[str]:
        """Stable names of the clients, each once.

        An engine whose clients come over a network waits here until as many are there as the run needs.

        Raises:
            RunError: they do not come.
        """
        ...

    def examples(self, name: str) -> int | None:
        """How many training rows a client has, where the engine knows it; else the client is asked."""
        ...

    def ask(
        self, names: Sequence[str], message: Callable[[str], bytes], *, seconds: float | None, most: int
    ) -> Iterator[Reply]:
        """Ask these clients, and yield their replies as they come, in any order, each client at most once.

        Args:
            names: whom.
            message: makes the bytes for one of them; called when they are sent, so that they need not all be in
                memory.
            seconds: after which the iterator ends, whoever is missing. Default: it waits.
            most: bytes that an answer may have. An engine that fetches answers gives up one that is larger, with a
                reason, before it holds more than that of it.
        """
        ...
