"""From words on the command line and YAML files to a checked configuration, by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from manylora.errors import ConfigError
from manylora.files import check_types, read_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's defaults, our own line breaks."""


class _Parser(ArgumentParser):
    """Shows options with dashes, as they are typed, and shorter type notes."""

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        text = super().format_help(formatter)
        text = re.sub(r"--([a-z_]+)", lambda match: "--" + match[1].replace("_", "-"), text)
        text = re.sub(r", --[a-z-]+\+ [A-Z_]+", "", text)
        text = re.sub(r" \{true,false\}", "", text)
        return re.sub(r"\s*\(type:\s[^()]*(?:\([^()]*\)[^()]*)*\)", _default_only, text)


def _default_only(note: re.Match[str]) -> str:
    found = re.search(r"default:\s+(.*)\)$", note[0], flags=re.DOTALL)
    if found is None or found[1].strip() in ("null", "False", "false"):
        return ""
    return f" [{' '.join(found[1].split())}]"


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
    parser = _Parser(
        prog=f"manylora {verb}",
        description=description,
        exit_on_error=False,
        formatter_class=_Formatter,
        usage=f"manylora {verb} [options]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with any of the options below."
    )
    parser.add_class_arguments(config_class, None)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    arguments, files = _without_files(arguments)
    words, verbatim = _normalise(arguments, fields, [*positional, *texts], several, free=positional)
    for name in set(texts) & set(verbatim):
        verbatim[name] = verbatim[name].encode("utf-8", "replace").decode("utf-8")
    try:
        values = parser.parse_args(words).as_dict()
    except (argparse.ArgumentError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(_reason(error, verb, list(fields))) from error
    values.pop("config", None)
    given = {word[2:].partition("=")[0].rstrip("+") for word in words if word.startswith("--")} & set(fields)
    given |= set(verbatim)
    written = {key: value for file in files for key, value in _read_file(file, config_class, verb).items()}
    values |= {key: value for key, value in written.items() if key not in given}
    return config_class(**{**values, **verbatim}), given


def _without_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without every `--config FILE`, and the files.

    Read here and not by the parser, whose YAML has no bounds.
    """
    words, files, queue = list[str](), list[str](), list(arguments)
    while queue:
        word = queue.pop(0)
        if word == "--config" and queue:
            files.append(queue.pop(0))
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        else:
            words.append(word)
    return words, files


def _read_file(path: str, config_class: type[DataclassInstance], verb: str) -> dict[str, Any]:
    """Options from a YAML file, as strictly checked as given ones.

    Raises:
        ConfigError: the file cannot be read, or an option in it cannot be.
    """
    try:
        values = read_yaml(Path(path).expanduser())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--config {path} cannot be read ({reason}); give a YAML file of options."
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f'--config {path} holds no options; write one "name: value" a line.')
    check_types(config_class, values, source=f"--config {path}", remedy=f"see manylora {verb} --help")
    return values


def _normalise(
    arguments: Sequence[str],
    fields: dict[str, dataclasses.Field[Any]],
    plain: Sequence[str],
    several: Sequence[str],
    *,
    free: Sequence[str],
) -> tuple[list[str], dict[str, Any]]:
    """Dashes become underscores, `--flag` alone `--flag=true`, `--option value` one word.

    Texts of the `plain` and `several` options, named or not, are returned apart: the parser reads values as YAML, to
    which "null" and "# c" are nothing. Words without a name belong to the `free` ones, in this order.
    """
    words: list[str] = []
    verbatim: dict[str, Any] = {}
    free = list(free)
    waiting = False  # whether the last option still wants its value
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            is_flag = name in fields and fields[name].type in ("bool", bool)
            if is_flag and not equals and (not queue or queue[0].lower() not in ("true", "false")):
                equals, value = "=", "true"
            if not equals and name in fields and queue and not _is_option(queue[0]):
                equals, value = "=", queue.pop(0)  # joined, so that a value may begin with a dash
            if equals and name in plain:
                verbatim[name] = value
            elif equals and name in several:
                verbatim.setdefault(name, []).append(value)
            else:
                words.append(f"--{name}{equals}{value}")
            waiting = not equals and name != "help"
        elif waiting or not (free or several) or word == "-h":
            words.append(word)
            waiting = False
        elif free:
            verbatim[free.pop(0)] = word
        else:
            verbatim.setdefault(several[0], []).append(word)
    return words, verbatim


def _is_option(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _reason(error: Exception, verb: str, names: Sequence[str]) -> str:
    text = " ".join(str(error).split())
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", text) or re.search(
        r"[Kk]ey \"?'?([\w.]+)'?\"? is not expected", text
    )
    if unknown or "does not accept option" in text.lower():
        word = (unknown[1] if unknown else text).split()[0]
        near = difflib.get_close_matches(word.lstrip("-").partition("=")[0].replace("-", "_"), names, n=1)
        hint = f"did you mean --{near[0].replace('_', '-')}?" if near else f"see manylora {verb} --help."
        shown = word.replace("_", "-") if word.startswith("-") else word
        return f"unknown option {shown}; {hint}"
    value = re.search(r'Parser key "(\w+)": (.*)', text)
    if value:
        option = value[1].replace("_", "-")
        got = re.search(r"(?:Got value|Given value): (\S+)", value[2]) or re.search(
            r"[Gg]iven value type.*?Got value: (\S+)", value[2]
        )
        wanted = re.sub(r"\s*(?:Got value|Given value).*", "", value[2])
        kinds = [f"one of {choices}" for choices in re.findall(r"typing\.Literal\[(.*?)\]", wanted)]
        kinds += [name for name in re.findall(r"<class '(?:\w+\.)*(\w+)'>", wanted) if name != "NoneType"]
        if kinds:
            wanted = f"expected {' or '.join(dict.fromkeys(kinds))}"
        return f"--{option}{' ' + got[1] if got else ''}: {wanted.rstrip('.')}."
    return f"{text} (see manylora {verb} --help)"
