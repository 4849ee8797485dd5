"""One row of any data set, in the one shape that every other room reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Form: TypeAlias = Literal["alpaca", "prompt", "chat"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One prompt and the answer that belongs to it."""

    task: str
    instruction: str = ""
    """Alpaca instruction; the whole prompt, verbatim, where `form` is "prompt"."""
    input: str = ""
    """Alpaca input; may be empty."""
    output: str = ""
    """The reference answer, which the model is trained to write."""
    answer: str | None = None
    """Gold label of the rule-based metrics (the `answer` field of the reasoning files)."""
    messages: tuple[Message, ...] = ()
    """Where `form` is "chat": every turn before the answer."""
    form: Form = "alpaca"
    origin: str = ""
    """Where the row came from ("train.jsonl:12"), for error messages."""


TaskData: TypeAlias = Mapping[str, list[Example]]
"""Task name to its examples, in a stable order."""
