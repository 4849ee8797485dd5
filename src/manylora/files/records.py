"""What stands in a JSON file of ours, by type: read through a record or not at all.

There are two ways to read. What a run goes on from is checked: one damaged field is an error. A page about a folder
shows what there is: a damaged field is a missing one (`forgive_record`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from manylora.errors import ManyLoraError, RunError
from manylora.files.reading import parse_json, read_json, read_yaml, reason
from manylora.files.sums import check_noted

NanFloat = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
"""A number that may be none: NaN here, null in a file, as JSON has no NaN."""
Entry = TypeVar("Entry")
Several = Annotated[tuple[Entry, ...], Field(strict=False)]
"""Entries in their order: a list in a file."""
_LARGEST = 1e30
"""No count, score or loss of a run is larger; axes cannot hold all that floating point can."""
_LONGEST = 600
"""Characters of a text that a page shows."""


class Record(BaseModel):
    """The fields of an object that its readers use, with their types; what else stands in it is left alone."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _forgive(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Where damage is forgiven: entries that cannot be are left out, and other such fields have their default."""
        if info.context is not _FORGIVING:
            return handler(value)
        try:
            return handler(value)
        except ValidationError:
            parts = list(_sound_parts(value, handler))
            if parts:
                return type(parts[0])(entry for part in parts for entry in _entries(part))
            assert info.field_name is not None
            field = cls.model_fields[info.field_name]
            if field.is_required():
                raise  # and the entry of a list that this record is goes
            return field.get_default(call_default_factory=True)


_FORGIVING = {"damage": "forgiven"}


def _sound_parts(value: Any, handler: ValidatorFunctionWrapHandler) -> Iterator[Any]:
    """Each entry of a list or an object, alone in one, that can be."""
    alone = [[item] for item in value] if isinstance(value, list) else []
    single = [{key: item} for key, item in value.items()] if isinstance(value, dict) else []
    for part in (*alone, *single):
        try:
            yield handler(part)
        except ValidationError:
            continue


def _entries(part: Any) -> Any:
    return part.items() if isinstance(part, dict) else part


def _tame(value: Any) -> Any:
    """The same with no number that cannot be drawn and no text that fills a page."""
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value if abs(value) <= _LARGEST else None
    if isinstance(value, dict):
        return {_tame(key): _tame(item) for key, item in value.items()}
    return [_tame(item) for item in value] if isinstance(value, list) else value


_TYPE_NAMES = ("str", "int", "float", "bool", "dict[str,str]", "list[str]")
"""How pydantic names the branches of a union, which are no fields."""

Kind = TypeVar("Kind", bound=Record)


def read_record(path: Path, kind: type[Kind], *, remedy: str, error: type[ManyLoraError] = RunError) -> Kind:
    """The record in a JSON file of a run.

    Args:
        path: of the file.
        kind: what it holds.
        remedy: what to do about a damaged file.
        error: raised where it is one.

    Raises:
        RunError: it is not the one that its run noted; or, unless `error` says otherwise, it cannot be read, or lacks a
            field or has one of another type.
    """
    check_noted(path)
    try:
        value = read_json(path)
    except (OSError, ValueError) as fault:
        raise error(f"{path} cannot be read ({reason(fault)}); {remedy}.") from fault
    return check_record(value, kind, source=path, remedy=remedy, error=error)


def read_object(path: Path, *, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, or the settings in a YAML file, of a run.

    Raises:
        RunError: it cannot be read, is not the one that its run noted, or holds something else.
    """
    check_noted(path)
    try:
        found = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({reason(error)}); {remedy}.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds {type(found).__name__} where an object is expected; {remedy}.")
    return found


def check_record(
    value: Any, kind: type[Kind], *, source: object, remedy: str, error: type[ManyLoraError] = RunError
) -> Kind:
    """The record that a value holds.

    Raises:
        RunError: or `error`: a field is missing or of another type; the message names `source` and the field.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as fault:
        raise error(f"{source} is damaged ({_first_fault(fault)}); {remedy}.") from fault


def _first_fault(fault: ValidationError) -> str:
    """What is wrong with which field, and what stands there."""
    first = fault.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part not in _TYPE_NAMES) or "its value"
    said = first["msg"].removeprefix("Value error, ")
    value = (
        ""
        if first["type"] in ("missing", "value_error") or not first["loc"]
        else f", not {first['input']!r:.60}"
    )
    return f"{field}: {said[:1].lower()}{said[1:]}{value}"


def forgive_record(value: Any, kind: type[Kind]) -> Kind | None:
    """The record in a value, whose damaged fields have their defaults; `None` where one is damaged that has none."""
    try:
        return kind.model_validate(_tame(value), context=_FORGIVING)
    except ValidationError:
        return None


def forgive_lines(path: Path, kind: type[Kind]) -> Iterator[Kind]:
    """The records in a JSONL file, none where it is absent; a last line that a kill left half-written is left out, and
    so is an object that is no such record.

    Raises:
        RunError: another line is damaged, or holds no object.
    """
    if not path.is_file():
        return
    check_noted(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = parse_json(line.decode("utf-8"), finite=False)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                fault = reason(error)
            else:
                if isinstance(row, dict):
                    if (found := forgive_record(row, kind)) is not None:
                        yield found
                    continue
                fault = f"it holds {type(row).__name__} where an object is expected"
            raise RunError(f"{path}:{number} cannot be read ({fault}); mend or remove that line.")
