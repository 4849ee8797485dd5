"""The files of a data folder: which of them are read, for which task and split, and which are left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from manylora.data.formats import split_name, task_and_split
from manylora.data.readers import is_readable

_DEEPEST = 4
"""Folders in folders that are looked into."""

_LOOKED_AT = 10_000
"""Entries of a folder that is not read by which it is seen whether it holds data: it may be anything."""

_ABOUT = ("readme", "license", "licence", "citation", "changelog")
"""Files that stand beside data to be read by people: nobody expects rows of them."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of rows and what its place tells."""

    path: Path
    task: str
    """Of rows that do not name theirs."""
    split: str | None


@dataclass(kw_only=True)
class FolderFiles:
    """What is in a folder."""

    files: list[DataFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Names, relative to the folder, of files and folders that are not read."""


def list_folder(folder: Path) -> FolderFiles:
    """The data files of a folder, sorted by name, and what of it is left out.

    A folder's own files are tasks, and its subfolders that are named as splits divide them. Where it has neither, each
    of its subfolders is a task, whose files and splits are found in the same way. Names with a dot before are hidden.

    Raises:
        OSError: a folder cannot be listed.
    """
    found = FolderFiles()
    _walk(folder, folder, None, None, found, {folder.resolve()})
    return found


def _walk(
    root: Path, folder: Path, split: str | None, task: str | None, found: FolderFiles, seen: set[Path]
) -> None:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    before = len(found.files)
    for path in entries:
        if path.is_file() and is_readable(path):
            own_task, own_split = task_and_split(path)
            found.files.append(DataFile(path=path, task=task or own_task, split=split or own_split))
        elif path.is_file() and path.suffix.lower() != ".md" and not path.name.lower().startswith(_ABOUT):
            found.left_out.append(str(path.relative_to(root)))
    folders = [path for path in entries if path.is_dir() and path.resolve() not in seen]
    seen |= {path.resolve() for path in folders}
    deep = len(folder.relative_to(root).parts) >= _DEEPEST
    others = []
    for path in folders:
        name = split_name(path.name)
        if name is None or split is not None or deep:
            others.append(path)
        else:
            _walk(root, path, name, task, found, seen)
    has_rows = len(found.files) > before
    for path in others:
        if not (has_rows or deep):
            _walk(root, path, split, f"{task}/{path.name}" if task else path.name, found, seen)
        elif any(is_readable(inner) and inner.is_file() for inner in islice(path.rglob("*"), _LOOKED_AT)):
            found.left_out.append(f"{path.relative_to(root)}/")
