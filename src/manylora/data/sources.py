"""Where rows come from: a file, a folder, a data set of the Hub, or the embedded suite."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from manylora.data.examples import Example
from manylora.data.formats import parse_rows, split_name, task_and_split
from manylora.data.notes import DataNotes
from manylora.data.readers import SUPPORTED, Row, is_readable, read_rows
from manylora.data.sampling import sample_tasks
from manylora.errors import ConfigError, DataError

EMBEDDED = "embedded"
"""The source that names the suite which the package carries."""

_Split: TypeAlias = Literal["train", "validation", "test"]

SPLITS: tuple[str, ...] = ("train", "validation", "test")
"""The parts that a source may be divided into."""

_COMMANDS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines, turns of the direction of writing, halves of a character."""

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/(?P<name>[\w.-]+))(:(?P<config>[\w.-]+))?")

_DEEPEST = 4
"""Folders in folders that are looked into."""

_LOOKED_AT = 10_000
"""Entries of a folder that is not read by which it is seen whether it holds data: it may be anything."""

_ABOUT = ("readme", "license", "licence", "citation", "changelog")
"""Files that stand beside data to be read by people: nobody expects rows of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """Rows that share one default task, read when they are asked for."""

    default_task: str
    read: Callable[[], list[Row]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """A source's tables by split; None holds those that tell no split."""

    name: str
    tables: Mapping[str | None, list[_Table]]
    left_out: tuple[str, ...] = ()
    """Files and folders of it that are not read."""

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name in self.tables if name is not None)

    def pick(self, split: str | None) -> list[_Table]:
        if split is not None and split in self.tables:
            return self.tables[split]
        if None in self.tables and (not self.splits or split == "train"):  # unmarked files are for training
            return self.tables[None]
        if split is None and len(self.tables) == 1:
            return next(iter(self.tables.values()))
        there = ", ".join(self.splits)
        if split is None:
            also = " and files of none" if None in self.tables else ""
            raise DataError(f"{self.name} holds several splits ({there}){also}. Say which to read.")
        raise DataError(f"{self.name} has no {split} split, only {there}. Name the rows to read themselves.")


def load_examples(
    source: str | Path,
    *,
    task_column: str | None = None,
    tasks: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    require_output: bool = True,
    notes: DataNotes | None = None,
) -> dict[str, list[Example]]:
    """Read a source into its tasks' examples.

    Args:
        source: a file of JSON, JSON lines, CSV, TSV or Parquet (`SUPPORTED_SUFFIXES`); a folder of such files (see
            `list_folder`); "embedded"; or a Hub id "owner/name" or "owner/name:config" where no
            such path exists.
        task_column: field that names each row's task. Default: the `task` field; without one, the file name
            less its split ("boolq.test.json" is boolq), or the Hub data set's name.
        tasks: keep these, in this order. Default: all, in the order they first appear.
        split: "train", "validation" or "test" where the source is divided: by subfolders or file names of
            that name, by the Hub, or by the suite. A source that is not divided is read whole.
        limit: keep at most so many rows of each task, a sample (`sample_rows`). Default: all.
        require_output: False also takes rows without an answer, for prediction.
        notes: takes what is left out: files, and columns that nothing reads.

    Returns:
        Task name to its examples, each list non-empty.

    Raises:
        DataError: the source or one of its rows is missing, broken or of the wrong type.
        ConfigError: `split`, `limit` or `tasks` cannot be.
    """
    _check_settings(split=split, limit=limit, tasks=tasks)
    if str(source) == EMBEDDED:
        data = _load_embedded(split, tasks)
    else:
        opened = open_source(source)
        notes = notes or DataNotes()
        notes.left_out |= dict.fromkeys(opened.left_out)
        data = {}
        for table in opened.pick(split):
            for example in parse_rows(
                table.read(),
                default_task=table.default_task,
                task_column=task_column,
                require_output=require_output,
                unused=notes.unused,
            ):
                data.setdefault(example.task, []).append(example)
        _check_names(data, source=str(source))
    if tasks is not None:
        data = pick_tasks(data, tasks, source=str(source))
    return sample_tasks(data, limit)


def _check_names(tasks: Iterable[str], *, source: str) -> None:
    """Refuse names that would break the lines of a table, or command the terminal in which it is shown."""
    for task in tasks:
        if found := _COMMANDS.search(task):
            raise DataError(
                f"{source} has the task {task!a}, whose name holds the control character {found[0]!a}. Rename the task."
            )


def available_splits(source: str | Path) -> tuple[str, ...]:
    """The splits that a source is divided into; empty for one that is not divided.

    Raises:
        DataError: there is no such source.
    """
    return SPLITS if str(source) == EMBEDDED else open_source(source).splits


def pick_tasks(
    data: Mapping[str, list[Example]], tasks: Sequence[str], *, source: str
) -> dict[str, list[Example]]:
    """The named tasks of `data`, in the order named.

    Raises:
        DataError: a task is not there (listing those that are).
    """
    missing = [task for task in tasks if task not in data]
    if missing:
        raise DataError(
            f"{source} has no rows of task {', '.join(map(repr, missing))}. Its tasks: {', '.join(data)}."
        )
    return {task: data[task] for task in tasks}


def open_source(source: str | Path) -> _Source:
    """Find out what a source is and which splits it has, without reading the rows of files."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.exists():
            return _Source(name=str(path), tables={None: [_file_table(path)]})
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}). Check the path.") from error
    match = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if match and not is_readable(path) and not path.parent.is_dir():
        return _open_hub(match["id"], name=match["name"], config=match["config"])
    raise DataError(f"{source} does not exist.{_near(path)} Give a file, a folder or a Hub id (owner/name).")


def _check_settings(*, split: str | None, limit: int | None, tasks: Sequence[str] | None) -> None:
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split {split!r} is unknown. Choose from {', '.join(SPLITS)}.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} keeps no row. Take 1 or more, or leave it out.")
    listed = isinstance(tasks, list | tuple) and all(isinstance(task, str) for task in tasks)
    if tasks is not None and (not listed or not tasks or len(set(tasks)) != len(tasks)):
        raise ConfigError(f"tasks {tasks!r} must be a list of one or more different names.")


def _load_embedded(split: str | None, tasks: Sequence[str] | None) -> dict[str, list[Example]]:
    from manylora.data.suite import SUITE_TASKS, load_suite

    if split is None:
        raise DataError(f"{EMBEDDED} holds several splits ({', '.join(SPLITS)}). Say which to read.")
    for task in tasks or ():
        if task not in SUITE_TASKS:
            raise DataError(f"{EMBEDDED} has no task {task!r}. Its tasks: {', '.join(SUITE_TASKS)}.")
    return {task: list(rows) for task, rows in load_suite(cast(_Split, split), tasks=tasks).items()}


def _near(path: Path) -> str:
    """A guess at the name that was meant, as a sentence with a space before it, or nothing."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _file_table(path: Path, task: str | None = None) -> _Table:
    if not is_readable(path):
        raise DataError(f"{path} is a {path.suffix or 'suffixless'} file. {SUPPORTED}.")
    return _Table(
        default_task=task_and_split(path)[0] if task is None else task,
        read=functools.partial(read_rows, path),
    )


def _open_folder(folder: Path) -> _Source:
    found = list_folder(folder)
    tables: dict[str | None, list[_Table]] = {}
    for file in found.files:
        tables.setdefault(file.split, []).append(_file_table(file.path, file.task))
    if not tables:
        raise DataError(f"{folder} holds no data files. {SUPPORTED}.")
    left_out = list(found.left_out)
    if (
        None in tables and "train" in tables
    ):  # they may hold the rows of all splits: nobody should train on the test
        del tables[None]
        left_out += [str(file.path.relative_to(folder)) for file in found.files if file.split is None]
    order = {split: tables[split] for split in (None, *SPLITS) if split in tables}
    return _Source(name=str(folder), tables=order, left_out=tuple(left_out))


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


def _open_hub(dataset_id: str, *, name: str, config: str | None) -> _Source:
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    label = dataset_id if config is None else f"{dataset_id}:{config}"
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its log of every retry would bury the one line that follows
    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(dataset_id, name=config)
    except Exception as error:  # network, Hub, builder and format errors share no base class
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise DataError(
            f"{label} is no path here and could not be loaded from the Hub ({type(error).__name__}: "
            f"{reason}). Check the id, the connection and your access, or give a local file or folder."
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)
    tables: dict[str | None, list[_Table]] = {}
    others = [split for split in loaded if split_name(split) is None]
    for split, rows in loaded.items():
        read = functools.partial(_hub_rows, rows, f"{label} {split}")
        table = _Table(default_task=name, read=read)
        tables.setdefault(split_name(split) or split, []).append(table)
    return _Source(name=label, tables=tables, left_out=tuple(others if len(others) < len(loaded) else ()))


def _hub_rows(rows: Any, place: str) -> list[Row]:
    if len(rows) == 0:
        raise DataError(f"{place} holds no rows. Name another split or data set.")
    return [Row(place=f"{place} row {number}", fields=dict(row)) for number, row in enumerate(rows, start=1)]
