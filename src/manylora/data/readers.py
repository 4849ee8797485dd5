"""Files to rows: JSON, JSON lines, CSV, TSV and Parquet, with the place of every row kept for error messages.

Nothing here knows what a row means; `formats` does.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from manylora.errors import DataError

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_SHARE = 0.25
"""Of the free memory that one file's text may take: rows of Python objects are some three times as large."""
_CSV_LIMIT = threading.Lock()
"""Held while the csv module's limit of a cell is lifted, which it has for the whole process."""


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
    rows = list(_READERS[_suffix(path)](path))
    if not rows:
        raise DataError(f"{path} holds no rows. Fill it or leave it out.")
    return rows


def is_readable(path: Path) -> bool:
    """Whether the name is one of a file that `read_rows` reads."""
    return _suffix(path) in _READERS and (not _is_zipped(path) or _suffix(path) != ".parquet")


def stem_of(path: Path) -> str:
    """The name without what tells the file's kind: "boolq.test" of "boolq.test.json.gz"."""
    return Path(path.stem).stem if _is_zipped(path) else path.stem


def _is_zipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _suffix(path: Path) -> str:
    """The suffix that tells the kind: ".json" of "x.json.gz" too."""
    return (Path(path.stem) if _is_zipped(path) else path).suffix.lower()


def short(value: object) -> str:
    """`repr(value)`, cut to 60 characters, so that an error message stays one readable line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _bytes(path: Path) -> bytes:
    """The whole file, unzipped; read in pieces, so that neither a bomb nor a mistake fills the memory."""
    raw, most = bytearray(), _room()
    try:
        with (gzip.open if _is_zipped(path) else open)(path, "rb") as source:
            while part := source.read(_CHUNK):
                raw += part
                _refuse_large(path, len(raw), most)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}). Write it again.") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}). Check its permissions."
        ) from error
    if not raw.strip():
        raise DataError(f"{path} is empty. Fill it or leave it out.")
    return bytes(raw)


def _room() -> int:
    """Bytes that one file may hold."""
    return int(_SHARE * psutil.virtual_memory().available)


def _refuse_large(path: Path, size: int, most: int) -> None:
    if size > most:
        raise DataError(
            f"{path} holds more than {most / 2**30:.1f} GiB (unzipped), a quarter of the free memory. Split it, or "
            "take a machine with more."
        )


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


def _parse_json(text: str) -> Any:
    """A JSON value; a key that stands twice, of which Python would keep the last alone, is refused.

    Raises:
        ValueError, RecursionError: see `json.loads`.
    """
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {short(twice)} stands twice in one object")
    return found


def _read_lines(path: Path) -> Iterator[Row]:
    yield from _parse_lines(path, _text(path))


def _parse_lines(path: Path, text: str) -> Iterator[Row]:
    # Not str.splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = _parse_json(line)
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
            values = _parse_json(text)
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
    """A table with commas or, in a .tsv file, tabs; quoted alike."""
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    start = 1
    try:
        for cells in _without_limit(reader):
            place, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, place)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{place} has {len(cells)} cells where the header has {len(header)}. "
                    f"Put text with {'tabs' if delimiter != ',' else 'commas'}, quotes or line breaks in double quotes."
                )
            yield Row(place=place, fields=dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{start} is not valid CSV ({error}). Mend that line.") from error


def _without_limit(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The reader's rows, of whatever length: the csv module takes a cell above 131,072 characters for a fault."""
    while True:
        with _CSV_LIMIT:
            before = csv.field_size_limit(
                min(sys.maxsize, 2**31 - 1)
            )  # a C long, which Windows has of 32 bits
            try:
                cells = next(reader)
            except StopIteration:
                return
            finally:
                csv.field_size_limit(before)
        yield cells


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) != len(names) or "" in names:
        raise DataError(
            f"{place}: the header {short(names)} has an empty or repeated name. Give each column its own."
        )
    return names


def _read_parquet(path: Path) -> Iterator[Row]:
    # Not at the top: pyarrow takes a third of a second, and most runs do not need it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not path.stat().st_size:
            raise DataError(f"{path} is empty. Fill it or leave it out.")
        file = pq.ParquetFile(path)
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        _refuse_large(path, sum(group.total_byte_size for group in groups), _room())
        values = file.read().to_pylist()
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
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
    ".ndjson": _read_lines,
    ".tsv": _read_csv,
}

SUPPORTED_SUFFIXES = tuple(_READERS)
"""The file kinds that `read_rows` reads; all but Parquet zipped too, as ".jsonl.gz"."""

SUPPORTED = f"Supported: {', '.join(SUPPORTED_SUFFIXES)}, and all but .parquet as .gz too"
"""The sentence that says so, without its full stop."""
