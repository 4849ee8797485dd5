"""From words on the command line and YAML files to a checked configuration.

click cuts the words into options and their values; what a value may be, the configuration's own types and checks say.
"""

from __future__ import annotations

import difflib
import re
import shutil
import types
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

import click

from manylora.cli.help import help_page
from manylora.errors import ConfigError
from manylora.files import check_types, parse_yaml, read_yaml, reason
from manylora.files.settings import field_types, has_type

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

_TRUTH = {"true": True, "false": False}
_WHOLE = re.compile("[-+]?[0-9]{1,18}")


def parse(
    config_class: type[Config],
    arguments: Sequence[str],
    *,
    verb: str,
    description: str,
    positional: Sequence[str] = (),
    several: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> tuple[Config, set[str]]:
    """Read options and `--config FILE.yaml` into `config_class`; options win over the file.

    Args:
        config_class: dataclass whose fields are the options.
        arguments: words after the verb.
        verb: for messages.
        description: first paragraph of the help.
        positional: fields that may also be given without their name, in this order.
        several: fields that may be given many times, as lists of texts; further words without a name go to the first.
        texts: fields that hold any text, taken as it stands; bytes that are no UTF-8 become "?".

    Returns:
        The configuration, and the names of the fields given on the command line.

    Raises:
        ConfigError: an unknown option or a value of the wrong type.
        SystemExit: after --help.
    """
    hints = field_types(config_class)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found, words = _cut(arguments[:end], hints, several, verb)
    if {"-h", "--help"} & set(words):
        width = min(110, shutil.get_terminal_size().columns - 2)
        print(help_page(config_class, verb=verb, description=description, width=width), end="")
        raise SystemExit(0)
    given: dict[str, Any] = {}
    files = found.pop("config")
    for name, value in found.items():
        if hints[name] is bool:
            if value.lower() not in _TRUTH:
                raise ConfigError(f"--{_dashed(name)} {value}: expected true or false.")
            given[name] = _TRUTH[value.lower()]
        elif name in several:
            given[name] = list(value)
        elif _is_option(value) and (name not in texts or _field_of(value) in hints):
            raise _no_value(f"--{_dashed(name)}", verb)  # `--out --dry-run`: the folder is missing
        else:
            given[name] = value if name in (*positional, *texts) else _value(name, value, hints[name])
    free = list(positional)
    for place, word in enumerate([*words, *arguments[end + 1 :]]):
        if (place < len(words) and _is_option(word)) or not (free or several):
            near = difflib.get_close_matches(_field_of(word), hints, n=1)
            hint = f"did you mean --{_dashed(near[0])}?" if near else f"see manylora {verb} --help."
            raise ConfigError(f"unknown option {word}; {hint}")
        if free:
            given[free.pop(0)] = word
        else:
            given.setdefault(several[0], []).append(word)
    for name in set(texts) & set(given):
        given[name] = given[name].encode("utf-8", "replace").decode("utf-8")
    written = {key: value for file in files for key, value in _read_file(file, config_class, verb).items()}
    return config_class(**{**written, **given}), set(given)


def _cut(
    arguments: Sequence[str], hints: Mapping[str, Any], several: Sequence[str], verb: str
) -> tuple[dict[str, Any], list[str]]:
    """Option to its value as it was typed, a tuple of them where it may stand more than once; and all other words."""
    options = [click.Option(["--config"], multiple=True)]
    options += [click.Option([f"--{_dashed(name)}", name], multiple=name in several) for name in hints]
    try:
        context = click.Command(verb, params=[*options], add_help_option=False).make_context(
            verb,
            list(_with_truth(arguments, hints)),
            # Unknown options come back among the words: the guess at what was meant is ours.
            ignore_unknown_options=True,
            allow_extra_args=True,
            token_normalize_func=_dashed,
        )
    except click.BadOptionUsage as error:
        raise _no_value(error.option_name, verb) from None
    values = {name: value for name, value in context.params.items() if value not in (None, ())}
    return {"config": (), **values}, list(context.args)


def _with_truth(arguments: Sequence[str], hints: Mapping[str, Any]) -> Iterator[str]:
    """The words, and "=true" at every flag that stands alone: click would take any word behind it for its value."""
    for word, after in pairwise([*arguments, ""]):
        if hints.get(_field_of(word)) is bool and _is_option(word) and "=" not in word:
            yield word if after.lower() in _TRUTH else f"{word}=true"
        else:
            yield word


def _value(name: str, word: str, hint: Any) -> Any:
    """A word as its field takes it: read as YAML where it is no text."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if word in choices:
        return word
    if word == "null" and type(None) in kinds:
        return None
    value: Any = word
    if int in kinds and _WHOLE.fullmatch(word):
        value = int(word)  # 08 too, as `seq -w` writes it, which YAML takes for a text
    elif word.strip() and (str not in kinds or word.startswith("[")):  # YAML takes a blank for null
        try:
            value = parse_yaml(word)
        except ValueError:
            value = word
    if float in kinds and type(value) in (int, float):
        return float(value)  # inf and NaN too, which the configuration itself refuses
    if has_type(value, hint):
        return value
    if str in kinds:
        return word
    expected = [f"one of {', '.join(map(repr, choices))}"] if choices else []
    expected += [kind.__name__ for kind in kinds if kind in (int, float)]
    raise ConfigError(
        f"--{_dashed(name)}{' ' + word if word.strip() else ''}: expected {' or '.join(expected)}."
    )


def _is_option(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _field_of(word: str) -> str:
    """The field that an option is called after."""
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _no_value(option: str, verb: str) -> ConfigError:
    return ConfigError(f"argument {option}: expected one argument (see manylora {verb} --help)")


def _read_file(path: str, config_class: type[DataclassInstance], verb: str) -> Mapping[str, Any]:
    """Options from a YAML file, as strictly checked as given ones.

    Raises:
        ConfigError: the file cannot be read, or an option in it cannot be.
    """
    try:
        values = read_yaml(Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--config {path} cannot be read ({reason(error)}); give a YAML file of options."
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f'--config {path} holds no options; write one "name: value" a line.')
    check_types(config_class, values, source=f"--config {path}", remedy=f"see manylora {verb} --help")
    return values
