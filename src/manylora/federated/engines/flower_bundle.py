"""What the bundle names that is submitted to a SuperLink; both halves refuse, as neither is run by Flower here."""

from __future__ import annotations

from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()


@server.main()  # type: ignore[untyped-decorator]
def serve(*_: Any) -> None:
    """Refuse."""
    raise RuntimeError("start the SuperLink with --isolation process; the server is `manylora federate`")


@client.query()  # type: ignore[untyped-decorator]
def answer(*_: Any) -> Any:
    """Refuse."""
    raise RuntimeError(
        "start the SuperNode with --isolation process, and its worker: manylora federate --node"
    )
