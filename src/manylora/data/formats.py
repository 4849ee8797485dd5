"""Rows to examples: Alpaca fields, prompt and completion, or chat turns; and the task a row belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manylora.data.examples import Example, Form
from manylora.data.fields import (
    ACCEPTED_FORMS,
    check_unused,
    checked_text,
    is_blank,
    kind_name,
    listed_field,
    refuse_empty,
    seen_fields,
    text_field,
)
from manylora.data.readers import Row, short, stem_of
from manylora.data.turns import TURN_FIELDS, parse_chat
from manylora.errors import DataError

_USED: dict[Form, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "answer", "system", "history"),
    "prompt": ("prompt", "completion", "answer"),
    "chat": (*TURN_FIELDS, "answer", "system", "tools"),
}
"""The fields that each form reads."""

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
    stem = _SHARD.sub("", stem_of(path))
    if match := _SPLIT_SUFFIX.match(stem):
        return match["task"], split_name(match["split"])
    split = split_name(stem)
    if split is None:
        return stem, None
    folders = (folder.name for folder in path.absolute().parents)
    return next((name for name in folders if name and split_name(name) is None), "data"), split


def parse_rows(
    rows: Sequence[Row],
    *,
    default_task: str,
    task_column: str | None = None,
    require_output: bool = True,
    unused: set[str] | None = None,
) -> list[Example]:
    """Every row as an `Example`.

    The task is the `task_column`'s text; without one the `task` field's, where any row has it; else
    `default_task`. `unused` takes the names of the fields that nothing reads.

    Raises:
        DataError: a field is missing, of the wrong type or empty, or changes the row's meaning and is not used
            (naming the row, the value and the remedy).
    """
    column = task_column
    if column is None and any("task" in row.fields for row in rows):
        column = "task"
    found = [
        parse_row(
            row,
            task=default_task if column is None else _task(row, column),
            require_output=require_output,
            unused=unused,
        )
        for row in rows
    ]
    if unused is not None:
        unused.discard(column or "task")
    return found


def parse_row(row: Row, *, task: str, require_output: bool = True, unused: set[str] | None = None) -> Example:
    """One row as an `Example` of `task`; its form follows from its fields (see `ACCEPTED_FORMS`).

    `require_output=False` also takes rows that hold a prompt alone, for prediction. An empty answer text
    passes where a gold `answer` label stands beside it: such a row can be scored, though not trained on.

    Raises:
        DataError: a field is missing, of the wrong type or empty, or changes the row's meaning and is not used.
    """
    form = _form(row)
    gold = _gold(row)
    check_unused(row.fields, _USED[form], place=row.place, unused=unused)
    if form == "chat":
        chat = parse_chat(row, require_output=require_output, unused=unused)
        return Example(
            task=task,
            messages=chat.messages,
            output=chat.answer.content if chat.answer else "",
            answer_fields=chat.answer.fields if chat.answer else {},
            tools=chat.tools,
            answer=gold,
            form="chat",
            origin=row.place,
        )
    prompt_field, output_field = ("prompt", "completion") if form == "prompt" else ("instruction", "output")
    instruction = text_field(row, prompt_field)
    input_text = text_field(row, "input", optional=True) if form == "alpaca" else ""
    if not (instruction.strip() or input_text.strip()):
        raise DataError(f"{row.place}: field {prompt_field!r} is empty. Give the prompt or remove the row.")
    output = text_field(row, output_field, optional=not require_output)
    if require_output and gold is None:
        refuse_empty(output, field=output_field, place=row.place)
    return Example(
        task=task,
        instruction=instruction,
        input=input_text,
        system=text_field(row, "system", optional=True) if form == "alpaca" else "",
        history=_history(row) if form == "alpaca" else (),
        output=output,
        answer=gold,
        form=form,
        origin=row.place,
    )


def _form(row: Row) -> Form:
    marks: tuple[tuple[str, Form], ...] = (
        *((name, "chat") for name in TURN_FIELDS),
        ("prompt", "prompt"),
        ("instruction", "alpaca"),
    )
    # Tables with a column per form leave those of the others null or, in CSV, blank; a blank one alone is an error.
    for field, form in marks:
        if not is_blank(row.fields.get(field)):
            return form
    for field, form in marks:
        if field in row.fields:
            return form
    raise DataError(f"{row.place} has {seen_fields(row)} but no prompt field. {ACCEPTED_FORMS}")


def _history(row: Row) -> tuple[tuple[str, str], ...]:
    """The earlier turns of an Alpaca row: a list of [instruction, response]."""
    value = listed_field(row, "history")
    if value is None or not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in value):
        raise DataError(
            f"{row.place}: field 'history' is {short(row.fields['history'])}. Write a list of [instruction, response], "
            "or the row as messages."
        )
    turns = []
    for turn in value:
        asked, told = (checked_text(text, field="history", place=row.place) for text in turn)
        turns.append((asked, told))
    return tuple(turns)


def _gold(row: Row) -> str | None:
    """The optional `answer` label; numbers and booleans are common there and mean their JSON text."""
    value: Any = row.fields.get("answer")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if value is None:
        return None
    return checked_text(value, field="answer", place=row.place) or None


def _task(row: Row, column: str) -> str:
    if column not in row.fields:
        raise DataError(
            f"{row.place} has {seen_fields(row)} but no task column {column!r}. Name the one that holds the task."
        )
    value = row.fields[column]
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: task column {column!r} is {short(value)} ({kind_name(value)}), not text. "
            "Write the task's name there or name another column."
        )
    if not value.strip():
        raise DataError(f"{row.place}: task column {column!r} is empty. Write the task's name there.")
    return checked_text(value, field=column, place=row.place).strip()
