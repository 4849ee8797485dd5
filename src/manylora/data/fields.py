"""Fields of a row, checked: texts, and what changes a row's meaning and must not vanish."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from manylora.data.readers import Row, short
from manylora.errors import DataError

ACCEPTED_FORMS = (
    "Accepted: instruction, output (and input, answer); prompt, completion; or messages, a list of "
    "{role, content} that ends with the assistant's (or conversations, of {from, value})."
)
"""The sentence that every error about a row's fields ends with."""

_MEDIA = "A language model here reads text alone; remove the rows that need it."
_THOUGHT = (
    "Write it into the text to learn, or into the answer's turn of a chat row (messages) as "
    "'reasoning_content', or drop the column."
)
_TOOLS = "Write the row as messages, with tools and each turn's tool_calls."
_IN_PROMPT = "Write it into 'prompt', which is taken as it stands, or drop the column."
SWITCHES = ("weight", "train", "trainable")
"""Fields that say whether a row or a turn is learnt: 1 or true, 0 or false."""
MEANINGFUL: Mapping[str, str] = {
    "tools": "Only chat rows (messages) have tools; write the row so.",
    "tool_calls": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "documents": "Write them into the prompt.",
    "chat_template_kwargs": "Set the chat template so in the tokenizer's folder.",
    "system": _IN_PROMPT,
    "system_prompt": "Call it 'system'.",
    "history": "Write the earlier turns into 'messages'.",
    "reasoning_content": _THOUGHT,
    "thinking": _THOUGHT,
    "reasoning": _THOUGHT,
    **dict.fromkeys(SWITCHES, "Remove the row."),
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _MEDIA),
}
"""Fields that change what a row means, and what to do about one that its form does not use."""


def is_blank(value: object) -> bool:
    """Whether a field stands there for nothing: null, a blank cell of a table, an empty list."""
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def is_off(value: object) -> bool:
    """Whether a switch says no; tables may hold it as text."""
    return value in (0, "0", "0.0") or (isinstance(value, str) and value.strip().lower() == "false")


def check_unused(
    fields: Mapping[str, object],
    used: Collection[str],
    *,
    place: str,
    unused: set[str] | None,
    where: str = "",
) -> None:
    """Refuse a field that changes the row's meaning and is not among `used`; note the others' names.

    Args:
        fields: of a row, or of a turn.
        used: those that are read.
        place: for the error.
        unused: takes the names of fields that are neither used nor refused.
        where: written before a name in `unused`, such as "messages[].".

    Raises:
        DataError: naming the field and what to do.
    """
    for name, value in fields.items():
        if name in used or is_blank(value):
            continue
        if name in MEANINGFUL and (name not in SWITCHES or is_off(value)):
            raise DataError(
                f"{place}: field {name!r} is {short(value)}, which changes what the row means and is not used here. "
                f"{MEANINGFUL[name]}"
            )
        if unused is not None:
            unused.add(where + name)


def seen_fields(row: Row) -> str:
    """The row's field names, as an error lists them."""
    return "the fields " + ", ".join(map(repr, row.fields)) if row.fields else "no fields"


def text_field(row: Row, field: str, *, optional: bool = False) -> str:
    """A text; "" where an optional one is not there.

    Raises:
        DataError: it is missing or no text.
    """
    if field not in row.fields and not optional:
        raise DataError(f"{row.place} has {seen_fields(row)} but no {field!r}. {ACCEPTED_FORMS}")
    value = row.fields.get(field)
    if value is None and optional:
        return ""
    return checked_text(value, field=field, place=row.place)


def checked_text(value: object, *, field: str, place: str) -> str:
    """`value`, if it is a whole text.

    Raises:
        DataError: it is of another type, or holds half a character.
    """
    if not isinstance(value, str):
        remedy = (
            f"Write it as text: {short(str(value))}."
            if isinstance(value, (int, float))
            else "Write text there."
        )
        raise DataError(
            f"{place}: field {field!r} is {short(value)} ({kind_name(value)}), not text. {remedy}"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} holds {value[error.start]!r}, half a character. Remove it."
        ) from error
    return value


def parsed_json(value: object, *, field: str, place: str) -> Any:
    """What a text of JSON stands for; tables keep lists and objects so.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(checked_text(value, field=field, place=place))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: field {field!r} is {short(value)}, not JSON. Mend it.") from error


def listed_field(row: Row, field: str) -> Sequence[Any] | None:
    """The list in a field, which tables hold as JSON; empty where it is blank, None where it is no list.

    Raises:
        DataError: it is a text that is no JSON.
    """
    value = row.fields.get(field)
    if is_blank(value):
        return ()
    if isinstance(value, str):
        value = parsed_json(value, field=field, place=row.place)
    return value if isinstance(value, (list, tuple)) else None


def kind_name(value: object) -> str:
    """The kind of a JSON value, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"of type {type(value).__name__}"


def refuse_empty(text: str, *, field: str, place: str) -> None:
    """Refuse an answer without text.

    Raises:
        DataError: it is blank.
    """
    if not text.strip():
        raise DataError(f"{place}: field {field!r} is empty. Give the answer or remove the row.")
