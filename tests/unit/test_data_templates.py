"""What a chat template writes by itself: text before and after an answer, special tokens, the date."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chats import CHATML, DATED, THOUGHT, byte_tokenizer
from manylora.data import (
    Example,
    Message,
    answer_text,
    asks_date,
    check_date,
    closing_text,
    encode,
    encode_prompt,
    fix_date,
    render_prompt,
    without_closing,
)
from manylora.data.templates import plain_template
from manylora.errors import ConfigError, DataError


def chat(content: str = "Metal of a penny?", output: str = "copper", **more: Any) -> Example:
    messages = (Message(role="user", content=content),)
    return Example(task="t", form="chat", messages=messages, output=output, origin="c.jsonl:3", **more)


def learnt(example: Example, tokenizer: Any) -> str:
    row = encode(example, tokenizer, max_length=999, context_length=None)
    return tokenizer.decode(row.input_ids[row.prompt_length :])


# ---------------------------------------------------------------- around the answer


def test_text_that_the_template_puts_before_an_answer_is_prompt() -> None:
    tokenizer = byte_tokenizer(THOUGHT)
    opened = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    row = encode(chat(), tokenizer, max_length=999, context_length=None)
    assert tokenizer.decode(row.input_ids[: row.prompt_length]).endswith(opened)
    assert learnt(chat(), tokenizer) == "copper<|im_end|>"
    assert row.labels == [-100] * row.prompt_length + row.input_ids[row.prompt_length :]
    asked = chat(output="")  # the same prompt where the answer is to come
    for example in (chat(), asked):
        ids, _ = encode_prompt(example, tokenizer, max_length=999)
        assert ids == row.input_ids[: row.prompt_length]
        assert render_prompt(example, tokenizer).endswith(opened)
    thinking = chat(output="", thinks=True)  # as one asks a model whose answers brought their own
    assert render_prompt(thinking, tokenizer).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_blank_before_an_answer_stays_with_its_word() -> None:
    template = CHATML.replace("m['role'] + '\n' + m['content']", "m['role'] + ': ' + m['content']").replace(
        "assistant\n", "assistant:"
    )
    tokenizer = byte_tokenizer(template)
    assert learnt(chat(), tokenizer) == " copper<|im_end|>"


def test_text_that_the_template_puts_after_an_answer_is_learnt_and_not_scored() -> None:
    template = CHATML.replace("<|im_end|>\n", " [over]</s>")
    tokenizer = byte_tokenizer(template, eos="</s>")
    assert learnt(chat(), tokenizer) == "copper [over]</s>"
    assert answer_text(chat(), tokenizer) == "copper"
    closing = closing_text(chat(), tokenizer)
    assert closing == "[over]"
    assert without_closing("copper [over]", closing) == without_closing("copper", closing) == "copper"
    assert closing_text(chat(), byte_tokenizer(CHATML)) == ""  # special tokens are not read


# ---------------------------------------------------------------- special tokens


@pytest.mark.parametrize("frame", ["$A", "<s> $A", "$A <|im_end|>", "<s> $A <|im_end|>"])
@pytest.mark.parametrize("text", ["Hi", "<s>Hi", "Hi<|im_end|>", "<s>Hi<|im_end|>"])
def test_special_tokens_that_stand_in_a_prompt_are_there_once(frame: str, text: str) -> None:
    tokenizer = byte_tokenizer(frame=frame)
    example = Example(task="t", form="prompt", instruction=text, output="ho")
    ids, _ = encode_prompt(example, tokenizer, max_length=99)
    begins = frame.startswith("<s>") or text.startswith("<s>")
    assert tokenizer.decode(ids) == ("<s>" if begins else "") + text.removeprefix("<s>")


@pytest.mark.parametrize(
    "output", ["copper", "copper<|im_end|>", "copper<|im_end|>\n", "copper<|im_end|><|im_end|>"]
)
def test_an_answer_ends_once_whatever_its_text_says(output: str) -> None:
    plain = Example(task="t", form="prompt", instruction="Metal?", output=output)
    for tokenizer, example in ((byte_tokenizer(), plain), (byte_tokenizer(CHATML), chat(output=output))):
        assert learnt(example, tokenizer) == "copper<|im_end|>"
        assert answer_text(example, tokenizer) == "copper"


def test_a_template_that_begins_what_is_begun_already() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    ids, _ = encode_prompt(chat("<s>Hi"), tokenizer, max_length=99)
    assert tokenizer.decode(ids) == "<s>Hi"
    row = encode(chat("<s>Hi"), tokenizer, max_length=99, context_length=None)
    assert tokenizer.decode(row.input_ids) == "<s>Hicopper<|im_end|>"


def test_a_token_without_a_row_in_the_model_is_named() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    rows = len(tokenizer) - 1
    encode(chat(), tokenizer, max_length=99, context_length=None, vocabulary=rows)
    for call in (encode_prompt, lambda *a, **k: encode(*a, context_length=None, **k)):
        with pytest.raises(
            DataError, match=rf"c\.jsonl:3 gives the token '<\|extra\|>' \(id {rows}\), but the model"
        ):
            call(chat("<|extra|>?"), tokenizer, max_length=99, vocabulary=rows)


# ---------------------------------------------------------------- the date


def test_the_date_is_the_one_that_was_fixed_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(DATED)
    assert asks_date(tokenizer)
    assert not asks_date(byte_tokenizer(CHATML))
    fix_date(tokenizer, "2024-02-29")
    prompts = set()
    for zone in ("Etc/GMT+12", "Etc/GMT-14"):  # 26 hours apart, so never on one day
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        prompts.add(render_prompt(chat(), tokenizer))
    monkeypatch.undo()
    time.tzset()
    assert prompts == {
        "It is 29 February 2024.\n<|im_start|>user\nMetal of a penny?<|im_end|>\n<|im_start|>assistant\n"
    }
    fix_date(tokenizer, "1999-12-31")
    assert render_prompt(chat(), tokenizer).startswith("It is 31 December 1999.")
    assert plain_template(tokenizer) == DATED
    fix_date(tokenizer, None)
    assert tokenizer.chat_template == DATED


@settings(max_examples=40, deadline=None)
@given(
    day=st.dates(min_value=datetime.date(1970, 1, 1), max_value=datetime.date(2099, 12, 31)),
    form=st.sampled_from(["%Y-%m-%d", "%A, %-d %b %y", "100 %% %H:%M:%S %%d", "%j %U %B", "no date", ""]),
)
def test_every_format_gives_what_strftime_gives(day: datetime.date, form: str) -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now(FORM) }}{% endif %}".replace(
        "FORM", repr(form)
    )
    tokenizer = byte_tokenizer(template)
    fix_date(tokenizer, day.isoformat())
    moment = datetime.datetime.combine(day, datetime.time())
    assert render_prompt(chat(), tokenizer) == moment.strftime(form)


@pytest.mark.parametrize(
    "template", ["\n  {% if true %}a{% endif %} ", "  b\n", "{# c #}\n d", "{%- set x = 1 %}\n{{ x }}"]
)
def test_a_fixed_date_changes_nothing_else(template: str) -> None:
    asking = template + "{{ strftime_now('%Y') }}"
    plain, fixed = byte_tokenizer(asking), byte_tokenizer(asking)
    year = datetime.date.today().isoformat()
    fix_date(fixed, year)
    assert render_prompt(chat(), fixed) == render_prompt(chat(), plain)


def test_each_of_several_named_templates_is_dated() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": DATED, "tool_use": CHATML}
    fix_date(tokenizer, "2024-02-29")
    assert render_prompt(chat(), tokenizer).startswith("It is 29 February 2024.")
    assert plain_template(tokenizer) == {"default": DATED, "tool_use": CHATML}


@pytest.mark.parametrize("date", ["today", "2024-02-30", "20240229", "2024-2-9", ""])
def test_what_is_no_date_is_refused(date: str) -> None:
    with pytest.raises(ConfigError, match=rf"date is '{date}'; give a day as YYYY-MM-DD"):
        check_date(date)
