"""A client's private state on its own disk: versioned by round, each version whole or not there.

    HOME/NAME/round-0003/private.safetensors     A, M, … as they were after the client's part in round 3
    HOME/NAME/round-0003/state.json              round, settings, and whatever else the client notes

The server says which version an order starts from: the last round in which this client's answer counted. So an
answer that was lost or refused has never happened, an order given twice gives the same answer, and a run that is
killed and resumed ends as if it had not been.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from manylora.errors import RunError
from manylora.federated.exchange import State

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS, _FACTS = "private.safetensors", "state.json"


def folder_name(client: str) -> str:
    """A client's name as one folder name, reversible, whatever it contains."""
    name = quote(client, safe=" ()+,-_@")
    return "%2E" + name[1:] if name.startswith(".") else name


class VersionedState:
    """States by round in one folder; used by a client for what is private, by the server for what is shared.

    Args:
        path: the folder; made when the first state is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def versions(self) -> list[int]:
        """Rounds with a state, in order."""
        found = (folder.name.removeprefix("round-") for folder in self.path.glob("round-*"))
        return sorted(int(number) for number in found if number.isdigit())

    def read(self, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Matrices and notes of one version.

        Raises:
            RunError: it is not there or is damaged.
        """
        folder = self._folder(version)
        if not folder.is_dir():
            there = ", ".join(map(str, self.versions())) or "none"
            raise RunError(
                f"{self.path} has no state of round {version} (only {there}); put the folder back."
            )
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            return load_file(folder / _WEIGHTS), facts
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(f"{folder} is damaged ({error}); put a copy of the folder back.") from error

    def write(self, version: int, state: State, facts: Mapping[str, Any]) -> None:
        """Write a version, replacing one of the same round; after a crash it is there whole or not at all."""
        partial = self.path / f"round-{version:04d}.partial"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        save_file({name: state[name].contiguous() for name in sorted(state)}, partial / _WEIGHTS)
        (partial / _FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        for path in (partial / _WEIGHTS, partial / _FACTS):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        final = self._folder(version)
        if final.exists():
            shutil.rmtree(final)
        partial.replace(final)
        _sync_folder(self.path)

    def keep(self, *versions: int) -> None:
        """Remove every other version, and what a crash left."""
        for version in self.versions():
            if version not in versions:
                shutil.rmtree(self._folder(version))
        for partial in self.path.glob("*.partial"):
            shutil.rmtree(partial)

    def _folder(self, version: int) -> Path:
        return self.path / f"round-{version:04d}"


def _sync_folder(path: Path) -> None:
    """Make a rename durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
