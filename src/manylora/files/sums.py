"""Checksums at rest: what a run wrote is told from what a disk, a copy or a hand has made of it.

A flipped bit in a weight, in `lora_alpha` or in a learning rate gives a file that reads well and a result that is
wrong. So a run notes in its state.json the SHA-256 of what its result depends on, and each checkpoint and each
client's personal model in a complete.json that of its files. Files without a note, of earlier versions or copied
elsewhere, are read as they are; but where the notes themselves are lost or broken, nothing is read on trust.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from manylora.errors import RunError
from manylora.files.reading import read_json

NOTES = "files"
"""Key of state.json under which the checksums stand, by path inside the run folder."""
COMPLETE = "complete.json"
"""Written last into a checkpoint or a client's folder: what is there is whole, and has these checksums."""
_STATE = "state.json"
_RUN = ("config.yaml", "environment.json")
"""What a run folder has beside its state from the first second on."""
_REMEDY = "Put a copy of it back, or copy the adapter alone elsewhere to use it unchecked."
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
    """Refuse a file that is missing, or of which its run, checkpoint or client noted another checksum.

    Args:
        path: a file of a run folder, of a checkpoint or client's folder, or of a folder in one, such as
            adapter/adapter_config.json.

    Raises:
        RunError: naming the file, and what to do where it was changed on purpose; or the notes themselves are lost.
    """
    # A link to an adapter's folder leads to its run; a link in a run belongs to the run.
    places = (Path(os.path.abspath(path)), Path(os.path.realpath(path.parent)) / path.name)
    for place in dict.fromkeys(places):
        for folder in (place.parent, place.parent.parent):
            notes = _notes_of(folder)
            if notes is not None and notes != place:
                _check(place, folder, notes, shown=path)


def _check(place: Path, folder: Path, notes: Path, *, shown: Path) -> None:
    known = _read(notes).get(place.relative_to(folder).as_posix())
    if known is None or (place.is_file() and file_sum(place) == known):
        return
    again = "go on with --resume, which makes it again" if _is_made(place, folder) else ""
    if not place.is_file():
        raise RunError(
            f"{shown} is missing, though the run wrote it. Put a copy of it back{f', or {again}' if again else ''}."
        )
    raise RunError(
        f"{shown} is broken or was changed: it is not what the run wrote. Put a copy of it back"
        f"{f', or remove it and {again}' if again else ''}; if you changed it yourself, remove its line under "
        f'"{NOTES}" in {notes} to use it as it is.'
    )


def _is_made(path: Path, run: Path) -> bool:
    """Whether a run of `manylora train` makes the file again when it is continued: all but its settings."""
    return path.name != "config.yaml" and path.parent.name != "adapters" and (run / "checkpoints").is_dir()


def noted(run: Path) -> dict[str, str]:
    """The checksums that a run has noted; none where there is no run, or one of an earlier version.

    Raises:
        RunError: it is a run folder, and its state is missing or broken.
    """
    return _read(run / _STATE) if _is_run(run) else {}


def _is_run(folder: Path) -> bool:
    # Without its state, too: what was lost with it is what this module is for.
    return (folder / _STATE).is_file() or all((folder / name).is_file() for name in _RUN)


def _notes_of(folder: Path) -> Path | None:
    """The file with the checksums of what is in a folder; None where nothing says that there should be one.

    Raises:
        RunError: a client's complete.json is not what its run noted.
    """
    if _is_run(folder):
        return folder / _STATE
    marker, run = folder / COMPLETE, folder.parent.parent
    if folder.parent.name == "clients" and _is_run(run):
        _check(marker, run, run / _STATE, shown=marker)
    in_run = folder.parent.name == "checkpoints" and _is_run(run)
    return marker if in_run or marker.is_file() else None


def _read(notes: Path) -> dict[str, str]:
    """Path to checksum.

    Raises:
        RunError: the file is missing or broken, and its folder is known to be ours.
    """
    try:
        value = read_json(notes)
        sums = value.get(NOTES, {}) if isinstance(value, dict) else None
        if isinstance(sums, dict) and all(isinstance(known, str) for known in sums.values()):
            return sums
        fault = "it holds no checksums"
    except (OSError, ValueError) as error:
        fault = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if notes.name == _STATE and not any((notes.parent / name).is_file() for name in _RUN):
        return {}  # another program's file of that name
    raise RunError(
        f"{notes} is missing or broken ({fault}), so that nothing says whether the files beside it are what the run "
        f"wrote. {_REMEDY}"
    )
