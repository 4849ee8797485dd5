"""Files to rows: JSON, JSON lines, CSV and Parquet, with the place of every row kept for error messages.

Nothing here knows what a row means; `formats` does.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.errors import DataError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record as it stands in its source."""

    place: str
    """Where it stands: "train.jsonl:12" (a line) or "train.parquet row 12" (a row, from 1)."""
    fields: dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Every row of one file, in order; the form follows the file's suffix (see `SUPPORTED_SUFFIXES`).

    A `.json` file may hold a list of objects or one object per line. A byte order mark is skipped.

    Raises:
        DataError: the file cannot be read, is not UTF-8, is broken (naming the line) or holds no row.
    """
    rows = list(_READERS[path.suffix.lower()](path))
    if not rows:
        raise DataError(f"{path} holds no rows. Fill it or leave it out.")
    return rows


def short(value: object, *, width: int = 60) -> str:
    """`repr(value)`, cut to `width` characters, so that an error message stays one readable line."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}). Check its permissions."
        ) from error
    if not raw.strip():
        raise DataError(f"{path} is empty. Fill it or leave it out.")
    return raw


def _text(path: Path) -> str:
    raw = _bytes(path)
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16. Save it as UTF-8.")
    raw = raw.removeprefix(_BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line} is not UTF-8 (byte 0x{raw[error.start]:02x}). Save the file as UTF-8."
        ) from error


def _row(value: object, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f'{place} is {short(value)}, not an object. Write one {{"field": "text", …}} per row.'
        )
    return Row(place=place, fields=value)


def _read_lines(path: Path) -> Iterator[Row]:
    yield from _parse_lines(path, _text(path))


def _parse_lines(path: Path, text: str) -> Iterator[Row]:
    # Not str.splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{path}:{number} is not valid JSON ({reason}): {short(line.strip())}. Mend or remove it."
            ) from error
        yield _row(value, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno} is not valid JSON ({error.msg}). Mend that line."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not valid JSON ({error}). Mend the file.") from error
        for number, value in enumerate(values, start=1):
            yield _row(value, f"{path} row {number}")
        return
    if _is_one_value_over_lines(text):
        raise DataError(
            f"{path} holds one JSON value, not rows. Write a list of objects or one object per line."
        )
    yield from _parse_lines(path, text)


def _is_one_value_over_lines(text: str) -> bool:
    """Whether the text is one JSON value that spans lines, which is not JSON lines."""
    if "\n" not in text.strip():
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            place, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, place)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{place} has {len(cells)} cells where the header has {len(header)}. "
                    "Put text with commas, quotes or line breaks in double quotes."
                )
            yield Row(place=place, fields=dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{start} is not valid CSV ({error}). Mend that line.") from error


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) != len(names) or "" in names:
        raise DataError(
            f"{place}: the header {short(names)} has an empty or repeated name. Give each column its own."
        )
    return names


def _read_parquet(path: Path) -> Iterator[Row]:
    _bytes(path)
    # Not at the top: pyarrow takes a third of a second, and most runs do not need it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = pq.ParquetFile(path).read().to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last: a date after 9999
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} is not a readable Parquet file ({reason}). Write it again.") from error
    for number, value in enumerate(values, start=1):
        yield Row(place=f"{path} row {number}", fields=value)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

SUPPORTED_SUFFIXES = tuple(_READERS)
"""The file kinds that `read_rows` reads."""
