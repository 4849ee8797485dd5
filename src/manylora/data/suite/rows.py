"""The shape of one generated row, and what every task of the suite declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Kind = Literal["classification", "extraction", "structure-to-text", "formatting", "arithmetic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteRow:
    """One drawn example; `key` names its content, whatever template carries it."""

    instruction: str
    output: str
    key: Hashable
    input: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteTask:
    """A task of the suite: how to draw a row, and how it relates to the other tasks."""

    name: str
    kind: Kind
    summary: str
    skills: tuple[str, ...]
    draw: Callable[[Random, int], SuiteRow]
    """(generator, row number) to a row; the row number only balances labels."""
    shares_with: tuple[str, ...] = ()
    """Tasks that need some of the same sub-skills: transfer is possible."""
    conflicts_with: tuple[str, ...] = ()
    """Tasks that want another answer to like-looking input: interference is possible."""
    templates: tuple[str, ...] = ()
    """The prompt templates, for the test that pretraining never saw them."""


def options(choices: Sequence[str]) -> str:
    """The list of choices as FLAN writes it.

    >>> options(["yes", "no"])
    'OPTIONS:\\n- yes\\n- no'
    """
    return "OPTIONS:\n" + "\n".join(f"- {choice}" for choice in choices)


def shuffled(rng: Random, items: Sequence[str]) -> list[str]:
    """A shuffled copy."""
    return rng.sample(list(items), len(items))


def fill(template: str, *, text: str, **fields: str) -> tuple[str, str]:
    """Fill a template and say which part of the prompt `text` goes to.

    A template that names ``{text}`` carries it in the instruction and leaves the input empty;
    any other leaves it to the input.

    Returns:
        (instruction, input).
    """
    if "{text}" in template:
        return template.format(text=text, **fields), ""
    return template.format(**fields), text
