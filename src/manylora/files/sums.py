"""Checksums at rest: what a run wrote is told from what a disk, a copy or a hand has made of it.

A flipped bit in a weight, in `lora_alpha` or in a learning rate gives a file that reads well and a result that is
wrong. So a run notes in its state.json the SHA-256 of what its result depends on, and each checkpoint in its marker
that of all its files. Files without a note, of earlier versions or copied elsewhere, are read as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from manylora.errors import RunError
from manylora.files.reading import read_json

NOTES = "files"
"""Key of state.json under which the checksums stand, by path inside the run folder."""
_STATE = "state.json"
_BLOCK = 2**20


def file_sum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def folder_sums(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Path inside `folder` to checksum, for all files in it, or for those of `names` that are there."""
    if names is None:
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: file_sum(folder / name) for name in sorted(names) if (folder / name).is_file()}


def changed_file(folder: Path, sums: Mapping[str, Any]) -> str | None:
    """The first file of `sums` that is missing or not what it was; None where all are."""
    for name, known in sums.items():
        path = folder / name
        if not path.is_file() or file_sum(path) != known:
            return name
    return None


def check_noted(path: Path) -> None:
    """Refuse a file that is missing, or of which its run noted another checksum.

    Args:
        path: a file of a run folder, or of a folder in one, such as adapter/adapter_config.json.

    Raises:
        RunError: naming the file, and what to do where it was changed on purpose.
    """
    place = path.absolute()
    for run in (place.parent, place.parent.parent):
        known = noted(run).get(place.relative_to(run).as_posix())
        if known is None or (path.is_file() and file_sum(path) == known):
            continue
        again = "go on with --resume, which makes it again" if _is_made(place, run) else ""
        if not path.is_file():
            raise RunError(
                f"{path} is missing, though the run wrote it. Put a copy of it back{f', or {again}' if again else ''}."
            )
        raise RunError(
            f"{path} is broken or was changed: it is not what the run wrote. Put a copy of it back"
            f"{f', or remove it and {again}' if again else ''}; if you changed it yourself, remove its line under "
            f'"{NOTES}" in {run / _STATE} to use it as it is.'
        )


def _is_made(path: Path, run: Path) -> bool:
    """Whether a run of `manylora train` makes the file again when it is continued: all but its settings."""
    return path.name != "config.yaml" and path.parent.name != "adapters" and (run / "checkpoints").is_dir()


def noted(run: Path) -> dict[str, Any]:
    """The checksums that a run has noted; none where there is no run, or one whose state cannot be read."""
    if not (run / _STATE).is_file():
        return {}
    try:
        state = read_json(run / _STATE)
    except (OSError, ValueError):  # whoever needs the state itself will say so
        return {}
    notes = state.get(NOTES) if isinstance(state, dict) else None
    return notes if isinstance(notes, dict) else {}
