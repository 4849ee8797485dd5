"""Read a run folder without trusting it.

Whatever stands in these files may come from strangers: a value of another type than expected is a missing value, a
file that cannot be read is one line that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from manylora.errors import RunError
from manylora.files import check_noted, parse_json, read_json, read_yaml, reason
from manylora.table import clean


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        RunError: it is missing, broken, or holds something else.
    """
    check_noted(path)
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({reason(error)}); mend or remove it.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds {type(found).__name__} where an object is expected; mend or remove it.")
    return found


def read_if_there(path: Path) -> dict[str, Any]:
    """Like `read_object`, but an absent file is an empty object."""
    return read_object(path) if path.is_file() else {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, none where it is absent; half-written lines and other values are left out."""
    if not path.is_file():
        return
    check_noted(path)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = parse_json(line, finite=False)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of settings; an absent one is empty.

    Raises:
        RunError: it is broken or holds no settings.
    """
    if not path.is_file():
        return {}
    check_noted(path)
    try:
        found = read_yaml(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({reason(error)}); mend or remove it.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no settings; mend or remove it.")
    return found


_LARGEST = 1e30
"""No count, score or loss of a run is larger; axes cannot hold all that floating point can."""


def number(value: object) -> float | None:
    """A finite number of a size that can be drawn, else `None`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) and abs(found) <= _LARGEST else None


def whole(value: object) -> int | None:
    """A whole number, else `None`."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def text(value: object, *, limit: int = 300) -> str:
    """Any scalar or list of scalars in words; what is longer than `limit` characters is cut."""
    if isinstance(value, (list, tuple)):
        shown = ", ".join(text(item, limit=60) for item in value[:40])
        return _cut(shown + (", …" if len(value) > 40 else ""), limit)
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return "…"
    if isinstance(value, float):
        return f"{value:g}"
    return _cut(clean(str(value)), limit)


def rows(value: object) -> list[dict[str, Any]]:
    """The objects in a list, else nothing."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def mapping(value: object) -> dict[str, Any]:
    """An object, else an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(value: object) -> dict[str, float]:
    """The entries of an object that are numbers."""
    found = {text(key): number(item) for key, item in mapping(value).items()}
    return {key: item for key, item in found.items() if item is not None}


def mean(values: Iterable[float]) -> float | None:
    """Mean, `None` of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def stem(name: str) -> str:
    """`name` as the beginning of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "part"


def _cut(words: str, limit: int) -> str:
    return words if len(words) <= limit else words[: limit - 1] + "…"
