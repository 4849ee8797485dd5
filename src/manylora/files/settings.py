"""Settings from a file, checked as those of the command line: each value's type, bounds, and what it contradicts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from manylora.errors import ConfigError
from manylora.files.reading import lone_surrogate

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import TypeAdapter

    Config = TypeVar("Config", bound=DataclassInstance)

_LARGEST_WHOLE = 10**15
"""No count of rows, steps or bytes is larger; beyond 2**63 nothing below Python can hold it."""
_LARGEST = 1e15
"""Larger numbers overflow float32, or the product of two of them does."""
_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def build_config(
    kind: type[Config], values: Mapping[Any, Any], *, source: object, remedy: str, **more: Any
) -> Config:
    """A configuration from values that were read from a file.

    Args:
        kind: frozen dataclass that checks itself.
        values: name of a field to its value.
        source: the file, for the error; "" where the caller names it.
        remedy: what to do about a bad value.
        more: further fields, taken as they are.

    Raises:
        ConfigError: naming the file, the key and the value.
    """
    check_types(kind, values, source=source, remedy=remedy)
    try:
        return kind(**{**values, **more})
    except ConfigError as error:
        raise ConfigError(f"{_at(source)}{error}") from error


def check_types(
    kind: type[DataclassInstance], values: Mapping[Any, Any], *, source: object, remedy: str
) -> None:
    """Refuse values of other types than the fields of `kind` have, and keys that are no fields.

    Raises:
        ConfigError: naming the file, the key and the value.
    """
    from pydantic import ValidationError

    fields = _fields(kind)
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]}? Else {remedy}" if near else remedy
            raise ConfigError(f"{_at(source)}there is no setting {_shown(key)}; {hint}.")
        hint, adapter = fields[key]
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            raise ConfigError(
                f"{_at(source)}{key} is {_shown(value)}, not {_expected(hint)}; {remedy}."
            ) from error


def check_values(config: DataclassInstance) -> None:
    """Refuse what no setting of any kind may be: numbers without bounds, texts that are empty or no UTF-8.

    A text may be empty where its default is.

    Raises:
        ConfigError: naming the setting and its value.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str):
            _check_text(field.name, value, may_be_empty=field.default == "")
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, str):
                    _check_text(field.name, item, may_be_empty=True)
        elif isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
            raise ConfigError(f"{field.name} is {_shown(value)}; give at most {_LARGEST_WHOLE:,}.")
        elif isinstance(value, float) and (math.isnan(value) or abs(value) > _LARGEST):
            raise ConfigError(f"{field.name} is {value}; give a finite number, at most {_LARGEST:g}.")


def _check_text(name: str, value: str, *, may_be_empty: bool) -> None:
    if not value.strip() and not may_be_empty:
        raise ConfigError(f"{name} is empty; give a value, or leave it out.")
    if lone := lone_surrogate(value) or ("\\x00" if "\0" in value else ""):
        raise ConfigError(
            f"{name} is {_shown(value)}, which holds {lone}, no character of UTF-8; write it in UTF-8."
        )


def _at(source: object) -> str:
    return f"{source}: " if str(source) else ""


@cache
def _fields(kind: type[DataclassInstance]) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    """Field to its type and what checks it."""
    from pydantic import ConfigDict, TypeAdapter

    strict = ConfigDict(strict=True, allow_inf_nan=False)
    hints = get_type_hints(kind)
    return {
        field.name: (hints[field.name], TypeAdapter(hints[field.name], config=strict))
        for field in dataclasses.fields(kind)
    }


def _expected(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_expected, get_args(hint))))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is list:
        return f"a list of {_plural(get_args(hint)[0])}"
    return _WORDS.get(hint, str(hint))


def _plural(hint: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(hint, str(hint))


def _shown(value: object, *, width: int = 60) -> str:
    if (
        isinstance(value, int) and value.bit_length() > 64 * width
    ):  # Python itself refuses to write 5,000 digits
        return f"an integer of {value.bit_length()} bits"
    text = "null" if value is None else ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= width else text[: width - 1] + "…"
