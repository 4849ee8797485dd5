"""A client's private state on its own disk: versioned by round, each version whole or not there.

    HOME/NAME/round-0003.safetensors     A, M, … as they were after the client's part in round 3, and its notes

The server says which version an order starts from: the last round in which this client's answer counted. So an
answer that was lost or refused has never happened, an order given twice gives the same answer, and a run that is
killed and resumed ends as if it had not been.

Each file carries a checksum over its version, its notes and every byte of its matrices, which is compared when the file
is read: a bit that flipped on the disk would otherwise go into the weights of everybody.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from manylora.errors import RunError
from manylora.federated.faults import clean_text
from manylora.federated.parts import State
from manylora.files import whole_number

if TYPE_CHECKING:
    from torch import Tensor

_FACTS = "facts"
"""Key under which a file's checksum and notes stand in its metadata, as one text: safetensors writes two keys in any
order. Files of earlier versions have no checksum, so their text begins with the notes' "{"."""

_LONGEST_LOG = 2**20
"""Bytes after which a client's log begins anew: a server may ask for what cannot be as often as it likes."""

_LONGEST_NAME = 200
"""File systems allow 255 bytes; something like ".partial" may follow."""


class MissingStateError(RunError):
    """A version that should be on disk is not."""


class DamagedStateError(RunError):
    """A version on disk is not what was written."""


def folder_name(client: str) -> str:
    """A client's name as one folder name, whatever it contains; a very long one ends in its hash."""
    name = quote(client, safe=" ()+,-_@")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 33]}-{hashlib.sha256(client.encode()).hexdigest()[:32]}"
    return name


def append_log(path: Path, text: str) -> None:
    """Add a line to a client's own log, where its disk allows."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        full = path.is_file() and path.stat().st_size > _LONGEST_LOG
        with path.open("w" if full else "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {clean_text(text, most=2000)}\n")


class VersionedState:
    """States by round in one folder; used by a client for what is private, by the server for what is shared.

    Args:
        path: the folder; made when the first state is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def versions(self) -> list[int]:
        """Rounds with a state, in order."""
        names = (file.stem.removeprefix("round-") for file in self.path.glob("round-*.safetensors"))
        return sorted(number for name in names if (number := whole_number(name)) is not None)

    def read(self, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Matrices and notes of one version.

        Raises:
            MissingStateError, DamagedStateError: it is not there, or not as it was written.
        """
        path = self.file(version)
        if not path.is_file():
            there = ", ".join(map(str, self.versions())) or "none"
            raise MissingStateError(
                f"{self.path} has no state of round {version} (only {there}); put the folder back."
            )
        try:
            with safe_open(path, framework="pt") as file:
                text = file.metadata()[_FACTS]
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum, notes = ("", text) if text.startswith("{") else text.split(" ", 1)
            facts = json.loads(notes)
        except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
            raise DamagedStateError(f"{path} is damaged ({error!r}); put a copy of it back.") from error
        if checksum and checksum != _checksum(version, state, notes):
            raise DamagedStateError(
                f"{path} is damaged (its checksum is not the one that was written); put a copy of it back."
            )
        if not isinstance(facts, dict):
            raise DamagedStateError(f"{path} is damaged (its notes are {facts!r}); put a copy of it back.")
        return state, facts

    def write(self, version: int, state: State, facts: Mapping[str, Any]) -> None:
        """Write a version, replacing one of the same round; a crash leaves the old one or the new one, whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = (
            self.path / f"round-{version:04d}.{os.getpid()}.partial"
        )  # FLoRA's stacks have several writers
        whole = {name: state[name].contiguous() for name in sorted(state)}
        notes = json.dumps(facts, ensure_ascii=False)
        save_file(whole, partial, metadata={_FACTS: f"{_checksum(version, whole, notes)} {notes}"})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.file(version))
        _sync_folder(self.path)

    def keep(self, *versions: int) -> None:
        """Remove every other version, and what a crash left."""
        for version in self.versions():
            if version not in versions:
                self.file(version).unlink(missing_ok=True)
        for partial in self.path.glob("round-*.partial"):
            partial.unlink(missing_ok=True)

    def file(self, version: int) -> Path:
        """Where a version stands."""
        return self.path / f"round-{version:04d}.safetensors"


def _checksum(version: int, state: State, notes: str) -> str:
    digest = hashlib.sha256(f"{version} {notes}".encode())
    for name in sorted(state):
        value = state[name]
        digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_folder(path: Path) -> None:
    """Make a rename durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
