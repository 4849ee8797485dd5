"""Every field of every message: what it may be, read in one place at both ends.

    server to client   join, train, score    the settings; rank, version, the base's fingerprint and, for FLoRA, the
                                             number of stacks
    client to server   joined                examples, base, layers
                       trained               version, examples, loss, steps, moved
                       scored                scores, one row a task; nothing where there are no test rows
                       failed                code

A message with a field too many, one too few, or one of another type, range or length is refused as a whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from manylora.errors import AnswerError
from manylora.evaluation.scores import TaskScore
from manylora.federated.faults import FailedError, clean_text, fault_named, shown
from manylora.federated.parts import Shapes
from manylora.federated.wire import Message

Reader: TypeAlias = "Callable[[Any], Any]"
"""A value as it came to the value as it is used; raises a ValueError that says what it must be."""

_MOST_LOSS = 1e6
"""Mean loss of a token: ln(size of the vocabulary) where nothing is known, some dozens where training went wrong."""
_MOST_NORM = 1e9
_MOST_COUNT = 2**53
_MOST_SIZE = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What a client says of itself when it joins."""

    examples: int
    base: str
    layers: Shapes


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a client says of its training."""

    version: int
    examples: int
    loss: float
    steps: int
    moved: float


def read_joined(message: Message, *, name: str, max_examples: int) -> Joined:
    """The answer to "join".

    Raises:
        AnswerError: it is none, or a field cannot be.
    """
    _check_kind(message, "joined", name)

    def examples(value: Any) -> int:
        if type(value) is not int or not 1 <= value <= max_examples:
            raise AnswerError(
                f"it claims {shown(value)} examples; allowed are 1 to {max_examples} (--max-examples)"
            )
        return value

    return Joined(**_read(message.fields, {"examples": examples, "base": _label(200), "layers": _layers}))


def read_trained(message: Message, *, name: str, examples: int) -> Trained:
    """The answer to "train".

    Args:
        message: what came.
        name: of the client that was asked.
        examples: that it joined with.

    Raises:
        AnswerError: it is none, or a field cannot be.
    """
    _check_kind(message, "trained", name)

    def as_joined(value: Any) -> int:
        if type(value) is not int or value != examples:
            raise AnswerError(f"it claims {shown(value)} examples, but joined with {examples}")
        return value

    fields: dict[str, Reader] = {
        "version": _whole(0),
        "examples": as_joined,
        "loss": _real(_MOST_LOSS),
        "steps": _whole(0),
        "moved": _real(_MOST_NORM),
    }
    return Trained(**_read(message.fields, fields))


def read_scored(message: Message, *, name: str) -> tuple[TaskScore, ...]:
    """The answer to "score"; empty where the client has no test rows.

    Raises:
        AnswerError: it is none, or a field cannot be.
    """
    _check_kind(message, "scored", name)
    scores = _read(message.fields, {"scores": _task_scores}, optional={"scores"}).get("scores", ())
    if len({score.task for score in scores}) < len(scores):
        raise AnswerError("its scores name a task twice")
    return tuple(scores)


def read_order(message: Message) -> dict[str, Any]:
    """The fields of a server's message, at the client.

    Raises:
        AnswerError: a field cannot be.
    """
    _read({"round": message.round}, {"round": _whole(0, _MOST_SIZE)})
    fields: dict[str, Reader] = {"settings": _settings}
    if message.kind != "join":
        fields |= {"rank": _whole(1, _MOST_SIZE), "version": _whole(0), "stacks": _whole(0)}
        fields["base"] = _label(200)
    return _read(message.fields, fields, optional={"stacks", "base"})


def _check_kind(message: Message, kind: str, name: str) -> None:
    if message.kind == "failed" and message.client == name:
        raise FailedError(fault_named(message.fields.get("code")))
    if message.kind != kind or message.client != name:
        raise AnswerError(
            f"it is a {shown(message.kind)} of {shown(message.client)}, not the answer that was asked for"
        )


def _read(
    fields: Mapping[str, Any], readers: Mapping[str, Reader], *, optional: set[str] | None = None
) -> dict[str, Any]:
    if extra := sorted(set(fields) - set(readers)):
        raise AnswerError(f"it has a field {shown(extra[0])} that was not asked for")
    if missing := sorted(set(readers) - set(fields) - (optional or set())):
        raise AnswerError(f"it lacks its {missing[0]}")
    values = {}
    for name, value in fields.items():
        try:
            values[name] = readers[name](value)
        except ValueError as error:
            if isinstance(error, AnswerError):
                raise
            raise AnswerError(f"its {name} is {shown(value)}; it must be {error}") from error
    return values


# ---- kinds of values


def _whole(least: int, most: int = _MOST_COUNT) -> Reader:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"a whole number, {least} to {most}")
        return value

    return read


def _real(most: float) -> Reader:
    def read(value: Any) -> float:
        # Compared before it is converted: a float of 10**400 is an OverflowError.
        if type(value) not in (int, float) or not 0 <= value <= most:
            raise ValueError(f"a number, finite, 0 to {most:g}")
        return float(value)

    return read


def _label(most: int) -> Reader:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not value or clean_text(value, most=most) != value:
            raise ValueError(f"1 to {most} printable characters")
        return value

    return read


def _layers(value: Any) -> Shapes:
    if not isinstance(value, dict) or not value:
        raise AnswerError("it does not describe its base model")
    name_of, size = _label(300), _whole(1, _MOST_SIZE)
    shapes = {}
    for layer, shape in value.items():
        if not isinstance(shape, list) or len(shape) != 2:
            raise AnswerError(f"its layer {shown(layer)} has the shape {shown(shape)}")
        try:
            shapes[name_of(layer)] = (size(shape[0]), size(shape[1]))
        except ValueError as error:
            raise AnswerError(
                f"its layer {shown(layer)} has the shape {shown(shape)}; it must be {error}"
            ) from error
    return shapes


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("settings by name")
    return value


def _metric(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[A-Za-z0-9_.-]{1,40}", value):
        raise ValueError("the name of a metric")
    return value


def _task(value: Any) -> str:
    """A task is called as its client's rows call it, whatever that is; here it is shown to a person."""
    if not isinstance(value, str) or not value:
        raise ValueError("the name of a task")
    return clean_text(value)


def _error(value: Any) -> float | None:
    return None if value is None else _real(100.0)(value)


_ESTIMATE: Mapping[str, Reader] = {"mean": _real(100.0), "standard_error": _error, "n": _whole(1)}


def _task_scores(value: Any) -> list[TaskScore]:
    if not isinstance(value, list):
        raise ValueError("a list, one row a task")
    return [_task_score(row) for row in value]


def _task_score(value: Any) -> TaskScore:
    if not isinstance(value, dict):
        raise ValueError("a list of rows by field")

    def metrics(found: Any) -> dict[str, dict[str, Any]]:
        if not isinstance(found, dict):
            raise ValueError("estimates by metric")
        return {_metric(name): _fields_of(estimate, _ESTIMATE) for name, estimate in found.items()}

    rest: dict[str, Reader] = {"task": _task, "metric": _metric, "metrics": metrics}
    row = _read(value, {**rest, "score": _real(100.0), "standard_error": _error, "n": _whole(1)})
    main = row["metrics"].get(row["metric"])
    if main is None or not math.isclose(main["mean"], row["score"], abs_tol=1e-6) or main["n"] != row["n"]:
        raise AnswerError(f"its score of task {shown(row['task'])} is not that of its {row['metric']}")
    return TaskScore.model_validate(row)


def _fields_of(value: Any, readers: Mapping[str, Reader]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a mean, its standard error and n")
    return _read(value, readers)
