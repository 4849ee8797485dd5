"""What stands in a JSON file of ours, by type: read through a record or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from manylora.errors import RunError
from manylora.files.reading import read_json, reason
from manylora.files.sums import check_noted


class Record(BaseModel):
    """The fields of an object that its readers use, with their types; what else stands in it is left alone."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Record)


def read_record(path: Path, kind: type[Kind], *, remedy: str) -> Kind:
    """The record in a JSON file of a run.

    Args:
        path: of the file.
        kind: what it holds.
        remedy: what to do about a damaged file.

    Raises:
        RunError: it cannot be read, is not the one that its run noted, or lacks a field or has one of another type.
    """
    check_noted(path)
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({reason(error)}); {remedy}.") from error
    return check_record(value, kind, source=path, remedy=remedy)


def check_record(value: Any, kind: type[Kind], *, source: object, remedy: str) -> Kind:
    """The record that a value holds.

    Raises:
        RunError: a field is missing or of another type; the message names `source` and the field.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "its value"
        raise RunError(f"{source} is damaged ({field}: {first['msg'].lower()}); {remedy}.") from error
