"""The tokenizer's chat template: what it is given, which of a row's fields it reads, and what it writes by itself.

A template may put text of its own before the answer (an empty thought, say). That text is part of the prompt, in
training and in use alike: it is neither learnt nor generated nor scored. A template that asks for the date gets the one
that the run has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora.data.examples import Example
from manylora.data.turns import THOUGHTS
from manylora.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "manylora-answer-7f3a91"
"""An answer that stands in no conversation and that no template takes apart."""

_CLOCK = "strftime_now"
"""The function by which templates ask for the date; transformers answers it with the machine's clock."""

_DATED = "{#- manylora: the date of the run -#}"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template begins what it marks as the assistant's."""
_DIRECTIVES = "aAbBcdDeFgGhHIjklmMpPrRsSTuUVwWxXyYzZ"
_SECONDS = 10.0
"""Of computing, for one row. A long conversation takes milliseconds."""
_TRIED = 20
"""Rows by which it is seen whether a template reads a field of earlier turns."""


def check_date(date: str | None) -> str | None:
    """Refuse a date that is none; others pass.

    Raises:
        ConfigError: it is not YYYY-MM-DD.
    """
    with contextlib.suppress(ValueError, TypeError):
        if date is None or datetime.date.fromisoformat(date).isoformat() == date:
            return date
    raise ConfigError(f"date is {date!r}; give a day as YYYY-MM-DD.")


def today() -> str:
    """This machine's date, YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def asks_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template of the tokenizer asks what day it is."""
    return any(_CLOCK in template for template in _templates(tokenizer).values())


def fix_date(tokenizer: PreTrainedTokenizerBase, date: str | None) -> None:
    """Have the tokenizer's chat templates see midnight of `date` whenever they ask for the time; None: the clock again.

    The function that templates call is hidden by a macro of that name before the template, the only place that every
    version of transformers leaves to us: it makes plain text of whatever else it is given.
    """
    templates = {name: _undated(text) for name, text in _templates(tokenizer).items()}
    if date is not None:
        templates = {
            name: _macro(date) + text if _CLOCK in text else text for name, text in templates.items()
        }
    if templates:
        named = isinstance(tokenizer.chat_template, dict)
        tokenizer.chat_template = templates if named else templates[""]


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str] | None:
    """The tokenizer's chat template, or templates by name, as its authors wrote it: without a date of ours."""
    templates = {name: _undated(text) for name, text in _templates(tokenizer).items()}
    return templates.get("", templates or None)


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    template = getattr(tokenizer, "chat_template", None) or {}
    return dict(template) if isinstance(template, Mapping) else {"": str(template)}


def _undated(text: str) -> str:
    return text.partition("{%- endmacro %}\n")[2] if text.startswith(_DATED) else text


def _macro(date: str) -> str:
    moment = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    values = {
        f"%{flag}{name}": moment.strftime(f"%{flag}{name}") for flag in ("-", "") for name in _DIRECTIVES
    }
    # The line break after the last tag is the tag's (trim_blocks), so that the template begins as it did.
    return (
        f"{_DATED}{{%- macro {_CLOCK}(format) -%}}"
        "{%- set said = namespace(text=format | replace('%%', '\\x00')) -%}"
        f"{{%- for key, value in {json.dumps(values)}.items() -%}}"
        "{%- set said.text = said.text | replace(key, value) -%}{%- endfor -%}"
        "{{- said.text | replace('\\x00', '%') -}}{%- endmacro %}\n"
    )


@dataclass(frozen=True, kw_only=True)
class ChatText:
    """A chat row as its template writes it."""

    prompt: str
    """All that stands before the answer, the template's own opening of the answer with it."""
    answer: str | None
    """What is learnt: the answer and what the template writes after it. None where there is no answer, or where the
    template rewrites the conversation so that its prompt does not stand before its answer."""
    thinks: bool
    """Whether the answer begins in a way of its own where the template would else put an opening."""
    closing: str
    """What the template writes after an answer."""


def chat_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> ChatText:
    """Render a chat row.

    Raises:
        DataError: no chat template, one that refuses the row, or one that does not read a field of the row which
            changes its meaning (naming it).
    """
    asked = _rendered(example, tokenizer)
    _check_prompt_read(example, tokenizer, asked)
    opening, closing = _around_answers(example, tokenizer, asked)
    if not example.has_answer:
        own = example.thinks
        return ChatText(prompt=asked if own else asked + opening, answer=None, thinks=own, closing=closing)
    told = _told(example, tokenizer)
    _check_answer_read(example, tokenizer, told)
    # An answer that brings its own thought has no place for the template's empty one.
    thinks = bool(opening) and not told.startswith(asked + opening)
    prompt = asked if thinks else asked + opening
    whole = len(told) > len(prompt) and told.startswith(prompt)
    return ChatText(
        prompt=prompt, answer=told[len(prompt) :] if whole else None, thinks=thinks, closing=closing
    )


def _around_answers(example: Example, tokenizer: PreTrainedTokenizerBase, asked: str) -> tuple[str, str]:
    """What the template writes by itself between prompt and answer, and after the answer."""
    try:
        probed = _rendered(example, tokenizer, answer={"role": "assistant", "content": _PROBE})
    except DataError:
        return "", ""
    before, found, closing = probed.partition(_PROBE)
    if not found:
        return "", ""
    opening = before[len(asked) :] if before.startswith(asked) else ""
    # A blank belongs to the word after it, of which tokenizers make one token.
    return (opening.rstrip(" ") if opening.strip() else ""), closing


def _told(example: Example, tokenizer: PreTrainedTokenizerBase, *without: str) -> str:
    fields = {name: value for name, value in example.answer_fields.items() if name not in without}
    return _rendered(example, tokenizer, answer={"role": "assistant", "content": example.output, **fields})


def _check_prompt_read(example: Example, tokenizer: PreTrainedTokenizerBase, asked: str) -> None:
    """Refuse tools, and calls of them, that leave no trace in the prompt."""
    if example.tools and _same(asked, lambda: _rendered(example, tokenizer, tools=False)):
        raise _unread(example, "tools")
    if any("tool_calls" in turn.fields for turn in example.messages) and _same(
        asked, lambda: _rendered(example, tokenizer, without=("tool_calls",))
    ):
        raise _unread(example, "tool_calls")


def _check_answer_read(example: Example, tokenizer: PreTrainedTokenizerBase, told: str) -> None:
    """Refuse a call or a thought of the answer that would not be learnt."""
    thoughts = [name for name in THOUGHTS if name in example.answer_fields]
    for names in (["tool_calls"] if "tool_calls" in example.answer_fields else [], thoughts):
        if names and _same(told, lambda names=names: _told(example, tokenizer, *names)):
            raise _unread(example, names[0])


def _same(text: str, render: Any) -> bool:
    try:
        return bool(render() == text)
    except DataError:  # the template misses what was left out, so it reads it
        return False


def _unread(example: Example, field: str) -> DataError:
    return DataError(
        f"{origin_of(example)}: field {field!r} changes what the row means, but the tokenizer's chat template does not "
        "read it. Take a model whose template does, set tokenizer.chat_template, or write it into the turns' text."
    )


def unread_fields(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Fields of earlier turns that the template passes over: names, ids of calls, past thoughts.

    Templates leave them out on purpose (a past thought), or have no place for them; the rows mean about the same.
    """
    holders: dict[str, list[Example]] = {}
    for example in examples:
        for name in {name for turn in example.messages for name in turn.fields} - {"tool_calls"}:
            rows = holders.setdefault(name, [])
            if len(rows) < _TRIED:
                rows.append(example)
    return sorted(
        name
        for name, rows in holders.items()
        if all(_rendered(row, tokenizer) == _rendered(row, tokenizer, without=(name,)) for row in rows)
    )


def unread_note(rows: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A sentence on what `unread_fields` finds in the chats among the rows; none where there is nothing."""
    names = unread_fields((row for row in rows if row.form == "chat"), tokenizer)
    return [f"the chat template does not read the turns' {', '.join(names)}"] if names else []


def earlier_turn(example: Example, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the template writes before the assistant's turn at `index`, its opening with it, and that with the turn, as
    if the conversation ended there.

    Raises:
        DataError: see `chat_text`.
    """
    turn = example.messages[index].to_dict()
    until = dataclasses.replace(example, messages=example.messages[:index])
    asked = _rendered(until, tokenizer)
    told = _rendered(until, tokenizer, answer=turn)
    opening, _ = _around_answers(until, tokenizer, asked)
    return asked + opening if told.startswith(asked + opening) else asked, told


def marked_tokens(
    example: Example, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]] | None:
    """Token ids of a row with its answer, and which of them the template marks as the assistant's; None where it has no
    such marks.

    Raises:
        DataError: see `chat_text`.
    """
    if not tokenizer.is_fast or not any(map(_GENERATION.search, _templates(tokenizer).values())):
        return None
    answer = {"role": "assistant", "content": example.output, **example.answer_fields}
    found = _applied(example, tokenizer, answer=answer, tokenize=True, return_assistant_tokens_mask=True)
    return list(found["input_ids"]), list(map(bool, found["assistant_masks"]))


def _rendered(example: Example, tokenizer: PreTrainedTokenizerBase, **given: Any) -> str:
    """The turns as the template writes them: up to where the answer begins, or with `answer`."""
    return str(_applied(example, tokenizer, **given))


def _applied(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer: Mapping[str, Any] | None = None,
    tools: bool = True,
    without: Sequence[str] = (),
    **options: Any,
) -> Any:
    """What `apply_chat_template` makes of the turns: text, unless `options` ask for tokens."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{origin_of(example)} is a chat row, but the tokenizer has no chat template. Take a chat model, "
            "set tokenizer.chat_template, or write the rows as prompt and completion."
        )
    turns = [
        {name: value for name, value in turn.to_dict().items() if name not in without}
        for turn in example.messages
    ]
    try:
        with _bounded():
            return tokenizer.apply_chat_template(
                turns if answer is None else [*turns, dict(answer)],
                tools=[dict(tool) for tool in example.tools] if tools and example.tools else None,
                add_generation_prompt=answer is None,
                **{"tokenize": False, "return_dict": True, **options},
            )
    except _TimeUpError:
        # no DataError: other rows would take as long, and a probe would pass over it
        raise ModelError(
            f"{origin_of(example)}: the tokenizer's chat template takes more than {_SECONDS:g} s over this row: it "
            "loops. Do not use a stranger's; set tokenizer.chat_template, or take another model or adapter."
        ) from None
    except Exception as error:  # a template is foreign code and refuses a row with whatever it likes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{origin_of(example)}: the tokenizer's chat template refuses the row ({reason}). Change its roles."
        ) from error


class _TimeUpError(Exception):
    """A template computes for too long."""


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """End the block after `_SECONDS` of this process's computing, where the system has a timer for that.

    A chat template comes with a model or an adapter, and its sandbox lets it count to 99,999 within as many. Python
    hears a timer in its main thread alone; in others, and on Windows, nothing is bounded.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TimeUpError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def origin_of(example: Example) -> str:
    """Where the row stands, for errors."""
    return example.origin or f"A row of task {example.task!r}"
