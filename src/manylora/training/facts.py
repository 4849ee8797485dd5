"""tasks.json: what a finished run notes of its tasks for those who use its adapter."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from manylora.files import Record, check_noted, read_record

_LONGEST = 2**31
"""Tokens of a prompt or an answer: more than any model reads."""


class TaskFact(Record):
    """What is known of one task."""

    answer_tokens: int | None = Field(default=None, ge=1, le=_LONGEST)
    """The longest answer worth generating; None where the adapter classifies."""
    labels: list[str] | None = None
    """Of a classifier: what its outputs mean, in order."""
    majority: str | None = None
    """Of a classifier: the most frequent training label."""


class TaskFacts(Record):
    """What is known of all tasks."""

    max_length: int = Field(ge=1, le=_LONGEST)
    """Tokens a prompt may have, as in training."""
    tasks: dict[str, TaskFact]


def read_task_facts(adapter: Path) -> TaskFacts | None:
    """The tasks.json beside an adapter folder; None where there is none.

    Raises:
        RunError: it is damaged.
    """
    path = adapter.parent / "tasks.json"
    check_noted(path)
    if not path.is_file():
        return None
    return read_record(path, TaskFacts, remedy="put a copy of it back, or train again")
