"""The clients of a run with the engine flower: at its SuperLink, as long as the run is worked on."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from manylora.errors import ConfigError
from manylora.federated.config import FederateConfig
from manylora.federated.engines.flower import FlowerClients
from manylora.federated.engines.flower_link import FlowerLink
from manylora.files import Record, read_record, write_json

_PATIENCE = 600.0
"""Seconds that a run without a deadline waits for a client whose node is away."""


class _About(Record):
    """What flower.json holds."""

    run: str


@contextlib.contextmanager
def flower_clients(
    config: FederateConfig, folder: Path, *, inside: str = "", say: Callable[[str], None]
) -> Iterator[FlowerClients]:
    """The clients of a run at its SuperLink, as long as the block lasts.

    Args:
        config: resolved, with engine flower.
        folder: of the run; keeps the id by which clients know the run, also when it is resumed.
        inside: the run's reference, whose private state the clients keep apart.
        say: told what the run waits for.
    """
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
    run = read_record(about, _About, remedy="put a copy of it back").run
    link = FlowerLink(config.superlink, certificate=Path(config.certificate) if config.certificate else None)
    failed = "the server ended"
    try:
        known = None if keys is None else link.register(keys)
        say(f"waiting for clients at {config.superlink}")
        yield FlowerClients(
            link,
            run=f"{run}-{inside}" if inside else run,
            expected=expected,
            keys=known,
            patience=config.deadline or _PATIENCE,
            say=say,
        )
        failed = ""
    finally:
        link.close(failed=failed)


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
