"""loss_on assistant: the tokens of every turn of the assistant's, each with its end, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from chats import CHATML, THOUGHT, TOOLS, byte_tokenizer
from manylora.data import IGNORED_LABEL, Example, encode, load_examples
from manylora.errors import DataError

TALK = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello!"},
    {"from": "human", "value": "How are you?"},
    {"from": "gpt", "value": "Fine."},
]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Marks what the assistant wrote, without its end."""


def load(folder: Path, turns: list[dict[str, Any]], **more: Any) -> Example:
    path = folder / "x.jsonl"
    path.write_text(json.dumps({"conversations": turns, **more}), encoding="utf-8")
    [[example]] = load_examples(path).values()
    return example


def learnt(example: Example, tokenizer: Any, loss_on: Any = "assistant", **more: Any) -> list[str]:
    """Each run of tokens that carries loss, as text."""
    row = encode(example, tokenizer, loss_on=loss_on, **{"max_length": 2000, "context_length": None, **more})
    assert len(row.labels) == len(row.input_ids)
    assert all(
        label in (IGNORED_LABEL, token) for label, token in zip(row.labels, row.input_ids, strict=True)
    )
    text = "".join(
        f"[{token}]" if label != IGNORED_LABEL else " "
        for label, token in zip(row.labels, row.input_ids, strict=True)
    )
    return [tokenizer.decode(list(map(int, re.findall(r"\d+", run)))) for run in text.split()]


@pytest.mark.parametrize("template", [CHATML, MARKED, TOOLS])
def test_every_turn_of_the_assistants_is_learnt_with_its_end(template: str, tmp_path: Path) -> None:
    example, tokenizer = load(tmp_path, TALK), byte_tokenizer(template)
    assert learnt(example, tokenizer) == ["Hello!<|im_end|>", "Fine.<|im_end|>"]
    assert learnt(example, tokenizer, "answer") == ["Fine.<|im_end|>"]
    ids = [
        encode(example, tokenizer, max_length=999, context_length=None, loss_on=how).input_ids
        for how in ("answer", "assistant", "all")
    ]
    assert ids[0] == ids[1] == ids[2]


def test_a_turn_that_ends_in_no_token_of_its_own_is_learnt_as_the_template_writes_it(tmp_path: Path) -> None:
    plain = (
        "{% for m in messages %}{{ '== ' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '== assistant\n' }}{% endif %}"
    )
    assert learnt(load(tmp_path, TALK), byte_tokenizer(plain)) == ["Hello!\n", "Fine.\n<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_turns_that_are_not_to_be_learnt_are_left_out(template: str, tmp_path: Path) -> None:
    turns = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[1:]]
    del turns[3]  # the second system text
    assert learnt(load(tmp_path, turns), byte_tokenizer(template)) == ["Hello!<|im_end|>", "Fine.<|im_end|>"]


def test_calls_of_tools_are_turns_of_the_assistants(tmp_path: Path) -> None:
    call = {"name": "tide_table", "arguments": {"harbour": "Whitby"}}
    tool = {"type": "function", "function": {"name": "tide_table", "parameters": {"type": "object"}}}
    turns = [
        {"from": "human", "value": "High water?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "06:12"},
        {"from": "gpt", "value": "At 06:12."},
    ]
    assert learnt(load(tmp_path, turns, tools=[tool]), byte_tokenizer(TOOLS)) == [
        f"<call>{json.dumps(call)}</call><|im_end|>",
        "At 06:12.<|im_end|>",
    ]


def test_a_row_of_one_answer_is_learnt_as_with_loss_on_answer(tmp_path: Path) -> None:
    short = load(tmp_path, TALK[:3])
    for template in (CHATML, THOUGHT):
        tokenizer = byte_tokenizer(template)
        assert learnt(short, tokenizer) == learnt(short, tokenizer, "answer")
    row = Example(task="t", instruction="Add.", output="5")
    assert learnt(row, byte_tokenizer()) == learnt(row, byte_tokenizer(), "answer") == ["5<|im_end|>"]


def test_a_cut_prompt_keeps_the_loss_of_what_is_left(tmp_path: Path) -> None:
    example, tokenizer = load(tmp_path, TALK), byte_tokenizer(CHATML)
    row = encode(example, tokenizer, max_length=42, context_length=None, loss_on="assistant")
    assert row.truncated
    assert len(row.input_ids) == 42
    assert learnt(example, tokenizer, max_length=42) == ["lo!<|im_end|>", "Fine.<|im_end|>"]


def test_turns_that_a_template_rewrites_later_are_refused(tmp_path: Path) -> None:
    example = load(tmp_path, TALK)
    with pytest.raises(
        DataError,
        match=r"x\.jsonl:1: the chat template writes turn 2 of the conversation otherwise once more",
    ):
        learnt(example, byte_tokenizer(THOUGHT))
    assert learnt(example, byte_tokenizer(THOUGHT), "answer") == ["Fine.<|im_end|>"]
    history = Example(task="t", instruction="b", history=(("a", "A"),), output="B", origin="x:1")
    with pytest.raises(DataError, match=r"x:1: the responses in 'history' have no end in the Alpaca form"):
        learnt(history, byte_tokenizer(CHATML))
