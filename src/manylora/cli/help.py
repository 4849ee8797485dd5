"""The help page of a verb: its options in groups, each with the sentence that stands under its field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from manylora.files import Settings, field_types

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_COMMON = [
    ("-h, --help", "Show this page and exit."),
    ("--config FILE", "YAML file with any of the options below; may be given many times."),
]


class Command(click.Command):
    """A verb whose options are the fields of a dataclass."""

    def __init__(
        self,
        config_class: type[DataclassInstance],
        *,
        verb: str,
        description: str,
        params: list[click.Parameter],
    ) -> None:
        super().__init__(
            verb,
            params=params,
            help=description,
            # Without -h, which click would also see in a word such as "-hello"; `parse` knows it.
            context_settings={"help_option_names": ["--help"], "max_content_width": 110},
        )
        self.config_class = config_class

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line: the description shows examples."""
        formatter.write_usage(ctx.command_path, "[options]")

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The description with its own line breaks."""
        formatter.write(f"\n{self.help}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A list for what the configuration itself adds, then one for every group that it is made of."""
        with formatter.section("Options"):
            formatter.write_dl(_COMMON)
        notes = field_notes(self.config_class)
        hints = field_types(self.config_class)
        fields = {field.name: field for field in dataclasses.fields(self.config_class)}
        for title, names in _sections(self.config_class).items():
            rows = [
                (f"--{name.replace('_', '-')}{_metavar(hints[name])}", _text(notes[name], fields[name]))
                for name in names
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


def field_notes(kind: type[DataclassInstance]) -> dict[str, str]:
    """Field to the text under it in the source, as one line.

    Where a subclass has a field again, its own text counts; one that begins with "Default:" replaces only what the
    inherited text says about the default.
    """
    notes: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        for name, note in _own_notes(owner):
            notes[name] = f"{_without_default(notes[name])} {note}" if note.startswith("Default:") else note
    return notes


def _own_notes(owner: type) -> Iterator[tuple[str, str]]:
    body = next(
        node.body
        for node in _module_body(owner.__module__)
        if isinstance(node, ast.ClassDef) and node.name == owner.__name__
    )
    for field, note in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(note, ast.Expr)
            and isinstance(note.value, ast.Constant)
        ):
            yield field.target.id, " ".join(str(note.value.value).split())


@cache
def _module_body(name: str) -> list[ast.stmt]:
    return ast.parse(inspect.getsource(sys.modules[name])).body


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
        is_group = group.__bases__ in ((Settings,), (object,))
        names = [name for name in vars(owner).get("__annotations__", {}) if name not in seen]
        seen.update(names)
        (groups if is_group else own).setdefault(group if is_group else owner, []).extend(names)
    sections = [*reversed(own.items()), *reversed(groups.items())]
    return {_title(owner): names for owner, names in sections if names}


def _title(owner: type) -> str:
    return (owner.__doc__ or owner.__name__).splitlines()[0].partition(". ")[0].rstrip(".")


def _metavar(hint: Any) -> str:
    kinds = [hint, *get_args(hint)]
    if hint is bool:
        return ""
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return f" {'|'.join(map(str, choices))}"
    return " TEXT" if str in kinds else " X" if float in kinds else " N"


def _text(note: str, field: dataclasses.Field[Any]) -> str:
    if field.default is None or field.default is False or field.default == "":
        return note
    return f"{_without_default(note)} [{field.default}]"


def _without_default(note: str) -> str:
    return note.partition(" Default:")[0]
