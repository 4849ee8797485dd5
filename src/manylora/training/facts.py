"""What a run notes for those who read it: tasks.json, for users of its adapter, and the lines of metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

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


class LogLine(Record):
    """One line of a training's metrics.jsonl."""

    step: float
    loss: float | None = None
    """Mean of the rows seen since the line before."""
    eval_mean_task_loss: float | None = None
    """Over tasks, on validation rows."""
    eval_losses: dict[str, float] = Field(default_factory=dict)
    """Task to its loss on validation rows."""

    @model_validator(mode="before")
    @classmethod
    def _gather_losses(cls, row: Any) -> Any:
        """They stand as "eval_loss/TASK" in the line."""
        if not isinstance(row, dict):
            return row
        start = "eval_loss/"
        losses = {key.removeprefix(start): value for key, value in row.items() if key.startswith(start)}
        return {**row, "eval_losses": losses}
