"""The engine flower as the command line uses it: this run's clients, or this machine as one."""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from manylora.errors import ConfigError, RunError
from manylora.federated.allowed import Allowed
from manylora.federated.config import FederateConfig
from manylora.federated.engines.flower import FlowerClients
from manylora.federated.engines.flower_link import FlowerLink
from manylora.files import read_json

_PATIENCE = 600.0
"""Seconds that a run without a deadline waits for a client whose node is away."""


@contextlib.contextmanager
def flower_clients(config: FederateConfig, folder: Path, *, inside: str = "") -> Iterator[FlowerClients]:
    """The clients of a run at its SuperLink, as long as the block lasts.

    Args:
        config: resolved, with engine flower.
        folder: of the run; keeps the id by which clients know the run, also when it is resumed.
        inside: the run's reference, whose private state the clients keep apart.
    """
    from manylora.files import write_json

    assert config.superlink is not None
    keys = None if config.node_keys is None else _keys(Path(config.node_keys))
    expected = config.clients or len(keys or {})
    if keys is not None and expected > len(keys):
        raise ConfigError(
            f"clients is {expected}, but {config.node_keys} has the keys of {len(keys)}; add the others'."
        )
    about = folder / "flower.json"
    if not about.exists():
        write_json(about, {"run": uuid.uuid4().hex})
    try:
        run = str(read_json(about)["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{about} is damaged ({error}); put a copy of it back.") from error
    link = FlowerLink(config.superlink, certificate=Path(config.certificate) if config.certificate else None)
    failed = "the server ended"
    try:
        known = None if keys is None else link.register(keys)
        _say(f"waiting for clients at {config.superlink}")
        yield FlowerClients(
            link,
            run=f"{run}-{inside}" if inside else run,
            expected=expected,
            keys=known,
            patience=config.deadline or _PATIENCE,
            say=_say,
        )
        failed = ""
    finally:
        link.close(failed=failed)


def run_node(supernode: str, given: set[str], *, allowed: Allowed) -> int:
    """Work for a SuperNode until Ctrl-C."""
    if extra := sorted(given - {"node", "engine", "allow_strategy", "allow_parts"}):
        raise ConfigError(
            f"--{extra[0].replace('_', '-')} beside --node: a client's settings stand in its SuperNode's --node-config."
        )
    from manylora.federated.engines.flower_node import work

    work(supernode, say=_say, allowed=allowed)
    return 0


def _keys(folder: Path) -> dict[str, bytes]:
    try:
        keys = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.pub"))}
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror}).") from error
    if not keys:
        raise ConfigError(
            f"node_keys {folder} has no NAME.pub; put each client's public key there (see --recipe)."
        )
    return keys


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
