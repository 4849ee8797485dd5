"""Writing into folders that may be a stranger's: whole files or none, and never through a link.

A run folder can come from anywhere, and `--resume` writes into it. A symbolic link, a hard link or a pipe under the
name of a file that is written would turn that into writing somewhere else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from manylora.errors import RunError


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` so that it holds either what it held or all of `data`, also after a crash.

    Raises:
        RunError: something else than a folder stands where its folder should, or a link.
        OSError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    remove(partial)
    with _open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file, made if need be, for this process; waits for another that holds it, which its end, however it comes,
    releases. On Windows nothing is held, as nothing there releases it after a kill.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_own(path, os.O_WRONLY) as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON that every reader takes: it has no NaN and no infinity, so these become null."""
    return json.dumps(without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False)


def without_nan(value: Any) -> Any:
    """The same values, None for each that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    return [without_nan(part) for part in value] if isinstance(value, (list, tuple)) else value


def append_line(path: Path, line: str) -> None:
    """Add one line to a file, made if need be.

    Raises:
        RunError: `path` is a link or no regular file.
        OSError: it cannot be written.
    """
    with open_own(path, os.O_APPEND | os.O_WRONLY) as file:
        file.write(line.encode("utf-8") + b"\n")


def open_own(path: Path, flags: int) -> BinaryIO:
    """Open a file that is there, or make it; one that has another name elsewhere is refused.

    Args:
        path: of the file.
        flags: as `os.open` takes them.

    Raises:
        RunError: `path` is a link or no regular file.
        OSError: it cannot be opened.
    """
    file = _open(path, flags | os.O_CREAT)
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        file.close()
        raise _not_ours(path)
    return file


def make_folder(path: Path) -> None:
    """Make a folder, with its parents, unless it is there.

    Raises:
        RunError: a link stands in its place.
        OSError: it cannot be made.
    """
    if path.is_symlink():
        raise _not_ours(path)
    path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link itself; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_links(folder: Path) -> None:
    """Refuse a folder in which a link leads out of it, before anything is written there.

    What a library writes, such as a checkpoint, goes through links; so they are looked for in all the folder.

    Raises:
        RunError: naming the link and where it leads.
    """
    root = folder.resolve()
    for parent, folders, files in os.walk(folder):  # which enters no link
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not _resolved(path).is_relative_to(root):
                raise RunError(
                    f"{path} is a link that leads out of its folder, to {os.readlink(path)}; what is written there "
                    "would overwrite that. Remove the link, or put in its place what it stands for."
                )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link to itself leads nowhere
        return path.parent.resolve()


def _open(path: Path, flags: int) -> BinaryIO:
    # Not blocking: a pipe in the place of a file would wait for its reader for ever.
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
            raise _not_ours(path) from error
        raise
    return os.fdopen(handle, "ab" if flags & os.O_APPEND else "wb")


def _not_ours(path: Path) -> RunError:
    return RunError(f"{path} is a link or no plain file, and so is not written to; remove it and try again.")
