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
        """A list for every group of settings, the groups that are made of others last."""
        with formatter.section("Options"):
            formatter.write_dl(
                [
                    ("-h, --help", "Show this page and exit."),
                    ("--config FILE", "YAML file with any of the options below; may be given many times."),
                ]
            )
        notes = field_notes(self.config_class)
        hints = field_types(self.config_class)
        fields = {field.name: field for field in dataclasses.fields(self.config_class)}
        for owner in _groups(self.config_class):
            names = [name for name in vars(owner).get("__annotations__", {}) if name in fields]
            if names:
                rows = [
                    (
                        f"--{name.replace('_', '-')}{_metavar(hints[name])}",
                        _text(notes[name], fields.pop(name)),
                    )
                    for name in names
                ]
                with formatter.section((owner.__doc__ or owner.__name__).splitlines()[0].rstrip(".")):
                    formatter.write_dl(rows)


def field_notes(kind: type[DataclassInstance]) -> dict[str, str]:
    """Field to the text under it in the source, as one line.

    Where a subclass has a field again, its own text counts; one that begins with "Default:" is added to the inherited.
    """
    notes: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        for name, note in _own_notes(owner):
            notes[name] = f"{notes[name]} {note}" if note.startswith("Default:") and name in notes else note
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


def _groups(kind: type) -> list[type]:
    """The classes that a configuration is made of, those first that are made of no others."""
    owners = [owner for owner in kind.__mro__ if dataclasses.is_dataclass(owner)]
    composed = [owner for owner in owners if owner.__bases__ not in ((Settings,), (object,))]
    return [owner for owner in owners if owner not in composed] + composed[::-1]


def _metavar(hint: Any) -> str:
    kinds = [hint, *get_args(hint)]
    if hint is bool:
        return ""
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return f" {'|'.join(map(str, choices))}"
    return " TEXT" if str in kinds else " X" if float in kinds else " N"


def _text(note: str, field: dataclasses.Field[Any]) -> str:
    return note if field.default in (None, "", False) else f"{note} [{field.default}]"
