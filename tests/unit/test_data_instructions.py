"""Rows of instruction and input: what becomes of them in a chat template, in the Alpaca form, as they stand."""

from __future__ import annotations

from typing import Any

import pytest

from chats import CHATML, byte_tokenizer
from manylora.data import (
    Example,
    PromptRecord,
    TaskPrompts,
    Template,
    apply_template,
    encode,
    question,
    render_prompt,
    resolve_template,
)
from manylora.errors import ConfigError

ROW = Example(task="t", instruction="Add.", input="2 3", output="5")
FULL = Example(
    task="t",
    instruction="And now?",
    system="Be brief.",
    history=(("Hi.", "Hello."),),
    output="Bye.",
    origin="x:1",
)
SYSTEM = "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\nYou help.<|im_end|>\n' -}}{%- endif -%}"
"""What a template writes before a conversation without a system text."""
LLAMA = (
    "{{ '<s>' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Ends turns with another token than the tokenizer's end of sequence."""


@pytest.mark.parametrize(
    ("template", "row", "prompt"),
    [
        ("alpaca", ROW, "### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n"),
        ("none", ROW, "Add.\n\n2 3"),
        ("chat", ROW, "<|im_start|>user\nAdd.\n\n2 3<|im_end|>\n<|im_start|>assistant\n"),
        ("none", FULL, "Be brief.\n\nHi.\n\nHello.\n\nAnd now?"),
        (
            "chat",
            FULL,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello."
            "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_a_row_becomes_the_prompt_that_the_template_says(
    template: Template, row: Example, prompt: str
) -> None:
    asked = apply_template(row, template)
    assert render_prompt(asked, byte_tokenizer(CHATML)) == prompt
    assert (asked.output, asked.origin, asked.task) == (row.output, row.origin, row.task)
    assert apply_template(asked, template) == asked


@pytest.mark.parametrize("form", ["prompt", "chat"])
def test_rows_of_other_forms_stay(form: Any) -> None:
    row = Example(task="t", form=form, instruction="Why?")
    assert apply_template(row, "chat") is row
    assert apply_template(row, "none") is row


def test_auto_is_the_tokenizers_own_template_where_it_has_one() -> None:
    with_template, without = byte_tokenizer(CHATML), byte_tokenizer()
    assert resolve_template("auto", with_template, model="a/model") == "chat"
    assert resolve_template("auto", without, model="a/model") == "alpaca"
    assert resolve_template("auto", with_template, model="embedded") == "alpaca"  # as it was measured
    assert resolve_template("chat", with_template, model="embedded") == "chat"
    assert resolve_template("none", without, model="a/model") == "none"
    with pytest.raises(
        ConfigError, match="template is chat, but the tokenizer has no chat template; take a chat"
    ):
        resolve_template("chat", without, model="a/model")


def test_what_a_template_adds_by_itself_is_alike_in_training_and_use() -> None:
    tokenizer = byte_tokenizer(SYSTEM + CHATML)
    row = encode(apply_template(ROW, "chat"), tokenizer, max_length=999, context_length=None)
    prompts = TaskPrompts.of([apply_template(ROW, "chat")], tokenizer, instructions="chat")
    asked = render_prompt(question("Add.", prompts, input_text="2 3"), tokenizer)
    assert tokenizer.decode(row.input_ids) == asked + "5<|im_end|>"
    assert asked.startswith("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n")


def test_an_answer_ends_with_the_turns_end_and_the_tokenizers() -> None:
    tokenizer = byte_tokenizer(LLAMA, eos="</s>")
    row = encode(apply_template(ROW, "chat"), tokenizer, max_length=999, context_length=None)
    learnt = [token for token in row.labels if token != -100]
    assert tokenizer.decode(learnt) == "5<|im_end|></s>"
    assert tokenizer.decode(row.input_ids[: row.prompt_length]) == "<s>user: Add.\n\n2 3<|im_end|>assistant: "


def test_the_record_says_how_instructions_were_asked_and_without_the_key_it_was_alpaca() -> None:
    tokenizer = byte_tokenizer(CHATML)
    rows = {"t": [apply_template(ROW, "chat")]}
    written = PromptRecord.of(rows, tokenizer, date=None, max_length=99, instructions="chat")
    assert written.tasks["t"] == TaskPrompts(form="chat", instructions="chat")
    assert written.template == CHATML
    assert (written.instructions_of("t"), written.instructions_of("of no name")) == ("chat", "chat")
    values = written.to_dict()
    del values["tasks"]["t"]["instructions"]
    assert PromptRecord(**values).instructions_of("t") == "alpaca"
    mixed = PromptRecord(tasks={**written.tasks, "u": TaskPrompts(form="alpaca")})
    assert [mixed.instructions_of(task) for task in ("t", "u", "v")] == ["chat", "alpaca", "alpaca"]


def test_a_question_with_an_input_is_asked_as_rows_were_that_stood_alone() -> None:
    asked = question("Add.", TaskPrompts(form="prompt", instructions="none"), input_text="2 3")
    assert (asked.form, asked.instruction) == ("prompt", "Add.\n\n2 3")
    assert asked == apply_template(question("Add.", TaskPrompts(form="alpaca"), input_text="2 3"), "none")
