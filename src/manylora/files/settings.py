"""Settings as frozen dataclasses that check themselves: each value's type, bounds, and what it contradicts.

A bound stands in a field's type (`limit: Count | None`), so that the command line, YAML files and Python refuse the
same values in the same words.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from os import PathLike, fspath
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from manylora.errors import ConfigError
from manylora.files.reading import lone_surrogate

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import TypeAdapter

    Config = TypeVar("Config", bound=DataclassInstance)

_SHOWN = 60
"""Characters of a value in an error."""
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


@dataclass(frozen=True)
class Bound:
    """What a number must be, beside its type."""

    holds: Callable[[float], bool]
    remedy: str
    """What to give instead, after "give "."""


_ABOVE_0 = Bound(lambda value: value > 0, "a value above 0")
_FROM_0 = Bound(lambda value: value >= 0, "0 or more")

Count: TypeAlias = Annotated[int, _ABOVE_0]
Positive: TypeAlias = Annotated[float, _ABOVE_0]
CountOrZero: TypeAlias = Annotated[int, _FROM_0]
NotNegative: TypeAlias = Annotated[float, _FROM_0]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings. Groups are combined by inheritance; each checks what its own fields contradict."""

    def __post_init__(self) -> None:
        kind: type[DataclassInstance] = type(self)
        for name, hint in field_types(kind).items():
            value = getattr(self, name)
            if not has_type(value, hint):
                value = _plain(value)
                object.__setattr__(self, name, value)
            if isinstance(value, float) and not math.isfinite(value):
                continue  # of the right type; `check_values` says what is wrong with it
            check_type(name, value, hint, remedy=f"see help({kind.__module__}.{kind.__name__})")
        check_values(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `config.yaml`."""
        return dataclasses.asdict(self)


def _plain(value: Any) -> Any:
    """A value of Python's as a file holds it: a path as text, a tuple as a list, a library's whole number as an int."""
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bool):
        return value
    return int(value) if isinstance(value, Integral) else value


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


def settings_of(config: DataclassInstance, kind: type[Config]) -> Config:
    """The part of a configuration that another kind of configuration has too."""
    return kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(kind)})


def check_types(
    kind: type[DataclassInstance], values: Mapping[Any, Any], *, source: object, remedy: str
) -> None:
    """Refuse values of other types than the fields of `kind` have, and keys that are no fields.

    Raises:
        ConfigError: naming the file, the key and the value.
    """
    hints = field_types(kind)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]}? Else {remedy}" if near else remedy
            raise ConfigError(f"{_at(source)}there is no setting {_shown(key)}; {hint}.")
        check_type(key, value, hints[key], source=source, remedy=remedy)


def check_type(name: str, value: object, hint: Any, *, source: object = "", remedy: str) -> None:
    """Refuse a value that is of another type.

    Raises:
        ConfigError: naming the file, the setting and the value.
    """
    if not has_type(value, hint):
        raise ConfigError(f"{_at(source)}{name} is {_shown(value)}, not {_expected(hint)}; {remedy}.")


@cache
def field_types(kind: type[DataclassInstance]) -> dict[str, Any]:
    """Each field's type, without its bounds, in the order of the fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def has_type(value: object, hint: Any) -> bool:
    """Whether a value is of a type, without any conversion but that of an int to a float; NaN and inf are of none."""
    from pydantic import ValidationError

    try:
        _adapter(hint).validate_python(value)
    except ValidationError:
        return False
    return True


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def check_values(config: DataclassInstance) -> None:
    """Refuse numbers beyond any use or their field's bound, and texts that are empty or no UTF-8.

    A text may be empty where its default is.

    Raises:
        ConfigError: naming the setting and its value.
    """
    bounds = _bounds(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            _check_value(field.name, item, may_be_empty=item is not value or field.default == "")
            for bound in bounds[field.name] if item is not None else ():
                if not bound.holds(item):
                    raise ConfigError(f"{field.name} is {item}; give {bound.remedy}.")


@cache
def _bounds(kind: type[DataclassInstance]) -> dict[str, list[Bound]]:
    """Field to its bounds, or those of its items."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: list(_bounds_in(hints[field.name])) for field in dataclasses.fields(kind)}


def _bounds_in(hint: Any) -> Iterator[Bound]:
    if get_origin(hint) is Annotated:
        yield from (extra for extra in hint.__metadata__ if isinstance(extra, Bound))
    else:
        for member in get_args(hint):
            yield from _bounds_in(member)


def _check_value(name: str, value: object, *, may_be_empty: bool) -> None:
    if isinstance(value, str):
        if not value.strip() and not may_be_empty:
            raise ConfigError(f"{name} is empty; give a value, or leave it out.")
        if lone := lone_surrogate(value) or ("\\x00" if "\0" in value else ""):
            raise ConfigError(
                f"{name} is {_shown(value)}, which holds {lone}, no character of UTF-8; write it in UTF-8."
            )
    elif isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
        raise ConfigError(f"{name} is {_shown(value)}; give at most {_LARGEST_WHOLE:,}.")
    elif isinstance(value, float) and (math.isnan(value) or abs(value) > _LARGEST):
        raise ConfigError(f"{name} is {value}; give a finite number, at most {_LARGEST:g}.")


def _at(source: object) -> str:
    return f"{source}: " if str(source) else ""


def _expected(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_expected, get_args(hint))))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is dict:
        return "a mapping"
    if get_origin(hint) is list:
        return f"a list of {_plural(get_args(hint)[0])}"
    return _WORDS.get(hint, str(hint))


def _plural(hint: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(hint, str(hint))


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 4000:  # Python itself refuses to write 5,000 digits
        return f"an integer of {value.bit_length()} bits"
    text = "null" if value is None else ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
