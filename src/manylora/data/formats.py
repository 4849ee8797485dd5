"""Rows to examples: Alpaca fields, prompt and completion, or chat messages; and the task a row belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manylora.data.examples import Example, Form, Message
from manylora.data.readers import Row, short
from manylora.errors import DataError

ACCEPTED_FORMS = (
    "Accepted: instruction, output (and input, answer); prompt, completion; or messages, a list of "
    "{role, content} that ends with the assistant's."
)
"""The sentence that every error about a row's fields ends with."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak in a chat row."""

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_SPLIT_SUFFIX = re.compile(rf"^(?P<task>.+)[._-](?P<split>{'|'.join(_SPLIT_NAMES)})$", re.IGNORECASE)


def split_name(name: str) -> str | None:
    """The split that a file or folder name stands for ("dev" is "validation"), or None."""
    return _SPLIT_NAMES.get(name.lower())


def task_and_split(path: Path) -> tuple[str, str | None]:
    """Task and split that a file name tells: "boolq.test.json" is ("boolq", "test").

    A file called just "train.jsonl" takes its task from the nearest folder that is not itself named as a
    split.
    """
    stem = _SHARD.sub("", path.stem)
    if match := _SPLIT_SUFFIX.match(stem):
        return match["task"], split_name(match["split"])
    split = split_name(stem)
    if split is None:
        return stem, None
    folders = (folder.name for folder in path.absolute().parents)
    return next((name for name in folders if name and split_name(name) is None), "data"), split


def parse_rows(
    rows: Sequence[Row], *, default_task: str, task_column: str | None = None, require_output: bool = True
) -> list[Example]:
    """Every row as an `Example`.

    The task is the `task_column`'s text; without one the `task` field's, where any row has it; else
    `default_task`.

    Raises:
        DataError: a field is missing, of the wrong type or empty (naming the row, the value and the remedy).
    """
    column = task_column
    if column is None and any("task" in row.fields for row in rows):
        column = "task"
    return [
        parse_row(
            row, task=default_task if column is None else _task(row, column), require_output=require_output
        )
        for row in rows
    ]


def parse_row(row: Row, *, task: str, require_output: bool = True) -> Example:
    """One row as an `Example` of `task`; its form follows from its fields (see `ACCEPTED_FORMS`).

    `require_output=False` also takes rows that hold a prompt alone, for prediction. An empty answer text
    passes where a gold `answer` label stands beside it: such a row can be scored, though not trained on.

    Raises:
        DataError: a field is missing, of the wrong type or empty.
    """
    form = _form(row)
    gold = _gold(row)
    if form == "chat":
        messages, output = _chat(row, require_output=require_output)
        return Example(
            task=task, messages=messages, output=output, answer=gold, form="chat", origin=row.place
        )
    prompt_field, output_field = ("prompt", "completion") if form == "prompt" else ("instruction", "output")
    instruction = _text(row, prompt_field)
    input_text = _text(row, "input", optional=True) if form == "alpaca" else ""
    if not (instruction.strip() or input_text.strip()):
        raise DataError(f"{row.place}: field {prompt_field!r} is empty. Give the prompt or remove the row.")
    output = _text(row, output_field, optional=not require_output)
    if require_output and gold is None:
        _refuse_empty(output, field=output_field, place=row.place)
    return Example(
        task=task,
        instruction=instruction,
        input=input_text,
        output=output,
        answer=gold,
        form=form,
        origin=row.place,
    )


def _form(row: Row) -> Form:
    marks: tuple[tuple[str, Form], ...] = (
        ("messages", "chat"),
        ("prompt", "prompt"),
        ("instruction", "alpaca"),
    )
    for field, form in marks:
        if row.fields.get(field) is not None:
            return form
    for field, form in marks:  # tables with a column per form hold null in the others; else null is an error
        if field in row.fields:
            return form
    raise DataError(f"{row.place} has {_seen(row)} but no prompt field. {ACCEPTED_FORMS}")


def _seen(row: Row) -> str:
    return "the fields " + ", ".join(map(repr, row.fields)) if row.fields else "no fields"


def _text(row: Row, field: str, *, optional: bool = False) -> str:
    if field not in row.fields and not optional:
        raise DataError(f"{row.place} has {_seen(row)} but no {field!r}. {ACCEPTED_FORMS}")
    value = row.fields.get(field)
    if value is None and optional:
        return ""
    return _checked(value, field=field, place=row.place)


def _checked(value: object, *, field: str, place: str) -> str:
    if not isinstance(value, str):
        remedy = (
            f"Write it as text: {short(str(value))}."
            if isinstance(value, (int, float))
            else "Write text there."
        )
        raise DataError(f"{place}: field {field!r} is {short(value)} ({_kind(value)}), not text. {remedy}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} holds {value[error.start]!r}, half a character. Remove it."
        ) from error
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"of type {type(value).__name__}"


def _refuse_empty(output: str, *, field: str, place: str) -> None:
    if not output.strip():
        raise DataError(f"{place}: field {field!r} is empty. Give the answer or remove the row.")


def _gold(row: Row) -> str | None:
    """The optional `answer` label; numbers and booleans are common there and mean their JSON text."""
    value: Any = row.fields.get("answer")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if value is None:
        return None
    return _checked(value, field="answer", place=row.place) or None


def _task(row: Row, column: str) -> str:
    if column not in row.fields:
        raise DataError(
            f"{row.place} has {_seen(row)} but no task column {column!r}. Name the one that holds the task."
        )
    value = row.fields[column]
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: task column {column!r} is {short(value)} ({_kind(value)}), not text. "
            "Write the task's name there or name another column."
        )
    if not value.strip():
        raise DataError(f"{row.place}: task column {column!r} is empty. Write the task's name there.")
    return _checked(value, field=column, place=row.place).strip()


def _chat(row: Row, *, require_output: bool) -> tuple[tuple[Message, ...], str]:
    turns = row.fields["messages"]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(
            f"{row.place}: field 'messages' is {short(turns)}, not a list of turns. {ACCEPTED_FORMS}"
        )
    messages = tuple(_message(turn, place=f"{row.place}, messages[{i}]") for i, turn in enumerate(turns))
    if messages[-1].role != "assistant":
        if not require_output:
            return messages, ""
        raise DataError(
            f"{row.place}: the last message is the {messages[-1].role}'s. End with the assistant's, "
            "which is the answer to learn."
        )
    if len(messages) == 1:
        raise DataError(f"{row.place}: the answer is the only message. Put the user's message before it.")
    if require_output:
        _refuse_empty(messages[-1].content, field=f"messages[{len(messages) - 1}].content", place=row.place)
    return messages[:-1], messages[-1].content


def _message(turn: object, *, place: str) -> Message:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise DataError(f"{place} is {short(turn)}. Write {{role, content}}.")
    role = turn["role"]
    if role not in ROLES:
        raise DataError(f"{place}: role {short(role)} is unknown. Known: {', '.join(ROLES)}.")
    return Message(role=role, content=_checked(turn["content"], field="content", place=place))
