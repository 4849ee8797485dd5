"""Chat rows: turns as OpenAI (role, content) or ShareGPT (from, value) writes them, tools, and which turn is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manylora.data.examples import Message
from manylora.data.fields import (
    ACCEPTED_FORMS,
    SWITCHES,
    check_unused,
    checked_text,
    is_blank,
    kind_name,
    listed_field,
    parsed_json,
    refuse_empty,
    text_field,
)
from manylora.data.readers import Row, short
from manylora.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak in a chat row."""

TURN_FIELDS = ("messages", "conversations")
"""Where a chat row keeps its turns."""

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names under which a turn keeps its reasoning."""

PASSED = ("name", "tool_calls", "tool_call_id", *THOUGHTS)
"""Fields of a turn that the chat template gets."""

_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""Speakers of ShareGPT's `from` as roles; a function_call's value is the call as JSON."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A chat row, read."""

    messages: tuple[Message, ...]
    """Every turn before the answer."""
    answer: Message | None
    """The last turn, the assistant's; None where there is no answer yet."""
    tools: tuple[Mapping[str, Any], ...]


def parse_chat(row: Row, *, require_output: bool, unused: set[str] | None) -> Chat:
    """The turns of a chat row. A `system` column stands before them; of the last turn the answer is made.

    Raises:
        DataError: something is missing, empty or of the wrong type, or the answer is marked as not to be learnt.
    """
    there = [name for name in TURN_FIELDS if name in row.fields]
    name = next((name for name in there if not is_blank(row.fields[name])), there[0])
    turns = row.fields[name]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(
            f"{row.place}: field {name!r} is {short(turns)}, not a list of turns. {ACCEPTED_FORMS}"
        )
    messages = [
        _message(turn, place=f"{row.place}, {name}[{i}]", unused=unused, where=f"{name}[].")
        for i, turn in enumerate(turns)
    ]
    first = _system(row, messages[0], name)
    tools = _tools(row)
    if messages[-1].role != "assistant":
        if not require_output:
            return Chat(messages=(*first, *messages), answer=None, tools=tools)
        raise DataError(
            f"{row.place}: the last message is the {messages[-1].role}'s. End with the assistant's, "
            "which is the answer to learn."
        )
    if len(messages) == 1:
        raise DataError(f"{row.place}: the answer is the only message. Put the user's message before it.")
    answer = messages.pop()
    if require_output:
        place = f"{name}[{len(messages)}]"
        if not answer.fields.get("tool_calls"):
            refuse_empty(answer.content, field=f"{place}.content", place=row.place)
        if not answer.learnt:
            raise DataError(
                f"{row.place}: {place} is the answer to learn, but its {_mark(turns[-1])} says that it is not to be "
                "learnt. Remove the row, or end it with the turn to learn."
            )
    return Chat(messages=(*first, *messages), answer=answer, tools=tools)


def _system(row: Row, first: Message, name: str) -> tuple[Message, ...]:
    """The turn that a `system` column stands for; none where the turns begin with it."""
    system = text_field(row, "system", optional=True)
    if first.role not in ("system", "developer"):
        return (Message(role="system", content=system),) if system else ()
    if system and system != first.content:
        raise DataError(
            f"{row.place}: field 'system' is {short(system)}, but {name}[0] is the {first.role}'s. Give one of the two."
        )
    return ()


def _message(turn: object, *, place: str, unused: set[str] | None, where: str) -> Message:
    if isinstance(turn, Mapping) and {"from", "value"} <= turn.keys() and "role" not in turn:
        turn = _from_sharegpt(turn, place)
    calls = isinstance(turn, Mapping) and not is_blank(turn.get("tool_calls"))
    if not isinstance(turn, Mapping) or "role" not in turn or not (calls or "content" in turn):
        raise DataError(f"{place} is {short(turn)}. Write {{role, content}}.")
    role = turn["role"]
    if role not in ROLES:
        raise DataError(f"{place}: role {short(role)} is unknown. Known: {', '.join(ROLES)}.")
    check_unused(turn, {"role", "content", *PASSED, *SWITCHES}, place=place, unused=unused, where=where)
    content = "" if calls and turn.get("content") is None else _content(turn["content"], place)
    fields = {name: turn[name] for name in PASSED if not is_blank(turn.get(name))}
    if calls:
        if role != "assistant":
            raise DataError(
                f"{place}: field 'tool_calls' stands in the {role}'s turn. Only the assistant calls."
            )
        fields["tool_calls"] = _calls(turn["tool_calls"], place)
    for name in set(fields) - {"tool_calls"}:
        fields[name] = checked_text(fields[name], field=name, place=place)
    return Message(role=role, content=content, fields=fields, learnt=_is_learnt(turn, place))


def _from_sharegpt(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A turn of {from, value} as one of {role, content}."""
    speaker = turn["from"]
    if speaker not in _SHAREGPT:
        raise DataError(f"{place}: 'from' is {short(speaker)}. Known: {', '.join(_SHAREGPT)}.")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if speaker != "function_call":
        return {**rest, "role": _SHAREGPT[speaker], "content": turn["value"]}
    calls = parsed_json(turn["value"], field="value", place=place)
    calls = calls if isinstance(calls, list) else [calls]
    return {**rest, "role": "assistant", "content": None, "tool_calls": calls}


def _content(value: object, place: str) -> str:
    """The text of a turn; a list of text parts, as OpenAI writes them too, is one text."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Mapping) for part in value):
        for part in value:
            if part.get("type") != "text":
                raise DataError(
                    f"{place}: field 'content' has a part of type {short(part.get('type'))}. A language model here "
                    "reads text alone; remove the row."
                )
        return "\n".join(checked_text(part.get("text"), field="content", place=place) for part in value)
    return checked_text(value, field="content", place=place)


def _calls(value: object, place: str) -> list[dict[str, Any]]:
    """Calls of tools as templates want them: each {type, function: {name, arguments}}, arguments an object."""
    calls = []
    for call in value if isinstance(value, (list, tuple)) else [None]:
        outer: Mapping[str, Any] = call if isinstance(call, Mapping) else {}
        inner = outer.get("function", outer)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError(
                f"{place}: field 'tool_calls' is {short(value)}. Write a list of "
                "{type: function, function: {name, arguments}}."
            )
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI writes JSON in JSON, which templates would quote once more
            arguments = parsed_json(arguments or "{}", field="arguments", place=place)
        named = {"id": outer["id"]} if isinstance(outer.get("id"), str) else {}
        function = {"name": inner["name"], "arguments": arguments}
        calls.append({**named, "type": "function", "function": function})
    return calls


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The row's tools; a column of tables holds them as JSON."""
    value = listed_field(row, "tools")
    if value is None or not all(isinstance(tool, Mapping) for tool in value):
        found = row.fields["tools"]
        raise DataError(
            f"{row.place}: field 'tools' is {short(found)} ({kind_name(found)}). Write a list of JSON schemas, "
            "{type: function, function: {name, description, parameters}}."
        )
    return tuple(value)


def _is_learnt(turn: Mapping[str, Any], place: str) -> bool:
    for name in SWITCHES:
        value = turn.get(name)
        if value is not None and value not in (0, 1):
            raise DataError(
                f"{place}: field {name!r} is {short(value)}. A turn is learnt (1, true) or not (0, false); weights "
                "between are not supported."
            )
    return all(turn.get(name) in (None, 1) for name in SWITCHES)


def _mark(turn: Mapping[str, Any]) -> str:
    """The field that says a turn is not learnt, with its value."""
    return next(f"{name!r} of {turn[name]!r}" for name in SWITCHES if turn.get(name) == 0)
