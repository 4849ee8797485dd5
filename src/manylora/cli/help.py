"""The help page of a verb: its options in groups, each with the sentence that stands under its field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from manylora.files.settings import Settings, field_types

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_COMMON = [
    ("-h, --help", "Show this page and exit."),
    (
        "--config FILE",
        "YAML file with any of the options below. Of several the last wins; what is typed wins over all.",
    ),
]


def help_page(kind: type[DataclassInstance], *, verb: str, description: str, width: int) -> str:
    """What a verb does, with examples, and the options that the fields of its configuration are."""
    page = click.HelpFormatter(width=width)
    page.write_usage(f"manylora {verb}", "[options]")
    page.write(f"\n{description}\n")
    with page.section("Options"):
        page.write_dl(_COMMON)
    notes, hints = field_notes(kind), field_types(kind)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for title, names in _sections(kind).items():
        with page.section(title):
            page.write_dl(
                [(_option(name, hints[name]), _text(notes[name], defaults[name])) for name in names]
            )
    return page.getvalue()


def field_notes(kind: type[DataclassInstance]) -> dict[str, str]:
    """Field to the text under it in the source, as one line.

    Where a subclass has a field again, its own text counts; one that begins with "Default:" replaces only what the
    inherited text says about the default.
    """
    notes: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        for field, below in pairwise(_class_bodies(owner.__module__)[owner.__name__]):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    note = " ".join(text.split())
                    inherited = f"{_without_default(notes[name])} " if note.startswith("Default:") else ""
                    notes[name] = inherited + note
    return notes


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    body = ast.parse(inspect.getsource(sys.modules[module])).body
    return {node.name: node.body for node in body if isinstance(node, ast.ClassDef)}


def _sections(kind: type) -> dict[str, list[str]]:
    """Title to its fields: those that the configuration itself adds, then group after group.

    A class that only extends one group stands with it. A field stands where it was first.
    """
    own: dict[type, list[str]] = {}
    groups: dict[type, list[str]] = {}
    seen: set[str] = set()
    for owner in reversed(kind.__mro__[:-1]):
        group = owner
        while len(group.__bases__) == 1 and group.__base__ not in (Settings, object):
            (group,) = group.__bases__
        is_group = group.__bases__ == (Settings,)
        names = [name for name in vars(owner).get("__annotations__", {}) if name not in seen]
        seen.update(names)
        (groups if is_group else own).setdefault(group if is_group else owner, []).extend(names)
    sections = [*reversed(own.items()), *reversed(groups.items())]
    return {(owner.__doc__ or "").partition(". ")[0].rstrip("."): names for owner, names in sections if names}


def _option(name: str, hint: Any) -> str:
    """An option with what it takes."""
    kinds = [hint, *get_args(hint)]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    value = "|".join(choices) or ("TEXT" if str in kinds else "X" if float in kinds else "N")
    return f"--{name.replace('_', '-')}{'' if hint is bool else ' ' + value}"


def _text(note: str, default: object) -> str:
    if default is None or default is False or default == "":
        return note
    return f"{_without_default(note)} [{default}]"


def _without_default(note: str) -> str:
    return note.partition(" Default:")[0]
