"""JSON and YAML as bounded plain values: a damaged or hostile file is a `ValueError` with a reason, never a crash.

Both formats can say in a few bytes what takes a machine to hold: brackets a hundred thousand deep, integers of
millions of digits, YAML aliases that expand for ever. What is read is bounded in bytes, depth, values and digits, and
holds nothing that could not be written again (a lone surrogate, a date, a set).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 256 * 2**20
"""Of a JSON file. The largest that a verb writes, a study's study.json, has some MiB."""
MOST_SETTINGS_BYTES = 2**20
"""Of a YAML file: settings that a person writes."""
_MOST_VALUES = 10_000_000
_MOST_SETTINGS = 100_000
_DEEPEST = 64
_MOST_BITS = 1000
"""Of an integer: few enough for a float."""


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, not UTF-8, no JSON, or its value is not bounded (see `parse_json`).
    """
    return parse_json(_text(path, most=MOST_BYTES))


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: of one value.
        finite: whether NaN and infinity are refused, which JSON does not have but many programs write.

    Raises:
        ValueError: it is no JSON, or too deep, too large an integer, not finite, or a text no UTF-8 can hold.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_plain(value, finite=finite)
    return value


def read_yaml(path: Path) -> Any:
    """A YAML file's value.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, not UTF-8, no YAML, or its value is not bounded (see `parse_yaml`).
    """
    return parse_yaml(_text(path, most=MOST_SETTINGS_BYTES))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: mappings, lists, texts, numbers, true, false and null, aliases expanded.

    Raises:
        ValueError: it is no YAML, or too deep, expands to too much, or holds another kind of value, such as a date.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {_yaml_reason(error)}") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_plain(value, finite=False, most=_MOST_SETTINGS)
    return value


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `parse_yaml` reads back."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def check_plain(value: object, *, finite: bool = True, most: int = _MOST_VALUES) -> None:
    """Refuse a value that is not bounded, or not plain.

    Args:
        value: mappings, lists and scalars; one that stands in several places counts in each.
        finite: whether NaN and infinity are refused.
        most: values in all.

    Raises:
        ValueError: it is; the message has no subject and no full stop.
    """
    # Without recursion: the depth is what is asked about.
    waiting: list[tuple[object, int]] = [(value, 0)]
    count = 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if count > most:
            raise ValueError(f"it expands to more than {most:,} values")
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        if isinstance(item, dict):
            waiting.extend((inner, depth + 1) for pair in item.items() for inner in pair)
        elif isinstance(item, list):
            waiting.extend((inner, depth + 1) for inner in item)
        else:
            _check_scalar(item, finite=finite)


def _check_scalar(item: object, *, finite: bool) -> None:
    if isinstance(item, str):
        if lone := lone_surrogate(item):
            raise ValueError(f"it holds {lone}, half of a character")
    elif isinstance(item, float):
        if finite and not math.isfinite(item):
            raise ValueError(f"it holds {item}, which is no number")
    elif isinstance(item, int):
        if item.bit_length() > _MOST_BITS:
            raise ValueError(f"it holds an integer of {item.bit_length()} bits")
    elif item is not None:
        raise ValueError(f"it holds a {type(item).__name__}, {str(item)[:40]!r}; put text in quotes")


def whole_number(text: str) -> int | None:
    """The number that a text of ASCII digits is; None for any other. `str.isdigit` also takes "²", which `int` does
    not, and digits of other scripts, so that two names would be one number.
    """
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def reason(error: Exception) -> str:
    """An error's cause in one line, without the file's name, which the caller gives."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def lone_surrogate(text: str) -> str:
    """The first half of a surrogate pair that stands alone, as `\\udcff`, which no UTF-8 file can hold; else ""."""
    if text.isascii():
        return ""
    found = _SURROGATE.search(text)
    return f"\\u{ord(found[0]):04x}" if found else ""


_SURROGATE = re.compile("[\ud800-\udfff]")


def _text(path: Path, *, most: int) -> str:
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte 0x{raw[error.start]:02x})") from error


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Of a key that stands twice, PyYAML would take the last in silence."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                known = (key.tag, key.value)
                if known in seen and key.value != "<<":
                    problem = f"the key {key.value!r} stands twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add(known)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys ("<<") copy what they name, each time: ten lines can ask for thousands of millions of copies."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_SETTINGS:
            raise yaml.constructor.ConstructorError(None, None, "merge keys expand to too much")


class _Dumper(yaml.SafeDumper):
    pass


_EXPONENTS = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""YAML 1.1 takes 1e-3 for text."""
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
# YAML 1.1 takes 1:30 for 90, 0x10 for 16, 0b11 for 3 and 010 for 8. Nobody writes settings so and means it: these are
# texts here, as in YAML 1.2, which the check of the setting's type refuses. The Dumper quotes what either version
# takes for a number.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (_INT, _FLOAT)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
for _pattern in (
    _EXPONENTS.pattern + "$",
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)$",
    r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_FLOAT, re.compile(_pattern), list("-+.0123456789"))
