"""Chat rows: what changes a row's meaning reaches the model, or the row is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chats import CHATML, THOUGHT, TOOLS, byte_tokenizer
from manylora.data import (
    DataNotes,
    Example,
    answer_text,
    encode,
    load_examples,
    prompt_text,
    render_prompt,
    unread_fields,
)
from manylora.errors import DataError

ASKED = {"role": "user", "content": "High water in Whitby?"}
CALL = {"type": "function", "function": {"name": "tide_table", "arguments": {"harbour": "Whitby"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "06:12", "tool_call_id": "c1", "name": "tide_table"}
ANSWER = {"role": "assistant", "content": "At 06:12."}
TABLE = {"type": "function", "function": {"name": "tide_table", "parameters": {"type": "object"}}}
WRITTEN = '<call>{"name": "tide_table", "arguments": {"harbour": "Whitby"}}</call>'


def load(folder: Path, row: dict[str, Any], **more: Any) -> Example:
    path = folder / "x.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    [[example]] = load_examples(path, **more).values()
    return example


def learnt(example: Example, tokenizer: Any) -> tuple[str, str]:
    """Prompt and answer as the model reads them."""
    row = encode(example, tokenizer, max_length=2000, context_length=None)
    return tuple(
        tokenizer.decode(part)
        for part in (row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :])
    )  # type: ignore[return-value]


def test_tools_and_past_calls_reach_the_template(tmp_path: Path) -> None:
    row = {"tools": [TABLE], "messages": [ASKED, CALLED, TOLD, ANSWER]}
    example = load(tmp_path, row)
    prompt, answer = learnt(example, byte_tokenizer(TOOLS))
    assert prompt.startswith(f"<|im_start|>system\nTools: {json.dumps([TABLE])}<|im_end|>")
    assert f"<|im_start|>assistant\n{WRITTEN}<|im_end|>" in prompt
    assert answer == "At 06:12.<|im_end|>"
    assert WRITTEN.removeprefix("<call>")[:20] in prompt_text(example).replace('"function": ', "")
    as_json = load(tmp_path, {**row, "tools": json.dumps([TABLE])})  # as tables hold them
    assert as_json == example


def test_a_call_that_is_the_answer_is_learnt_and_scored(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(TOOLS)
    example = load(tmp_path, {"messages": [ASKED, {**CALLED, "content": "One moment."}]})
    assert learnt(example, tokenizer)[1] == f"One moment.{WRITTEN}<|im_end|>"
    assert answer_text(example, tokenizer) == f"One moment.{WRITTEN}"
    bare = load(tmp_path, {"messages": [ASKED, CALLED]})
    assert answer_text(bare, tokenizer) == WRITTEN
    assert bare.has_answer
    assert bare.answer_key != example.answer_key


def test_arguments_of_a_call_may_be_json_in_json(tmp_path: Path) -> None:
    function = {"name": "tide_table", "arguments": json.dumps({"harbour": "Whitby"})}
    for call in ({"id": "c1", "type": "function", "function": function}, function):
        example = load(tmp_path, {"messages": [ASKED, {**CALLED, "tool_calls": [call]}]})
        assert answer_text(example, byte_tokenizer(TOOLS)) == WRITTEN


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"tools": [TABLE], "messages": [ASKED, ANSWER]}, "tools"),
        ({"messages": [ASKED, {**CALLED, "content": ""}, TOLD, ANSWER]}, "tool_calls"),
        ({"messages": [ASKED, {**CALLED, "content": "One moment."}]}, "tool_calls"),
        ({"messages": [ASKED, {**ANSWER, "reasoning_content": "Tides turn."}]}, "reasoning_content"),
        ({"messages": [ASKED, {**ANSWER, "thinking": "Tides turn."}]}, "thinking"),
    ],
)
def test_what_the_template_does_not_read_is_refused_by_name(
    row: dict[str, Any], field: str, tmp_path: Path
) -> None:
    example = load(tmp_path, row)
    with pytest.raises(
        DataError, match=rf"x\.jsonl:1: field '{field}' changes what the row means, but the tok"
    ):
        encode(example, byte_tokenizer(CHATML), max_length=999, context_length=None)


def test_a_thought_is_learnt_before_its_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(THOUGHT)
    example = load(tmp_path, {"messages": [ASKED, {**ANSWER, "reasoning_content": "Tides turn."}]})
    prompt, answer = learnt(example, tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert answer == "<think>\nTides turn.\n</think>\n\nAt 06:12.<|im_end|>"
    assert answer_text(example, tokenizer) == "<think>\nTides turn.\n</think>\n\nAt 06:12."


def test_fields_of_earlier_turns_that_the_template_passes_over_are_named(tmp_path: Path) -> None:
    earlier = {**ANSWER, "reasoning_content": "Tides turn."}
    example = load(tmp_path, {"messages": [{**ASKED, "name": "Ada"}, earlier, ASKED, ANSWER]})
    assert unread_fields([example], byte_tokenizer(CHATML)) == ["name", "reasoning_content"]
    named = CHATML.replace("m['role'] + '\n'", "m['role'] + (m['name'] or '') + '\n'")
    assert unread_fields([example], byte_tokenizer(named)) == ["reasoning_content"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"trainable": 0.0}])
def test_an_answer_that_is_not_to_be_learnt_is_refused(mark: dict[str, Any], tmp_path: Path) -> None:
    (name,) = mark
    with pytest.raises(
        DataError, match=rf"messages\[1\] is the answer to learn, but its '{name}' of .* says"
    ):
        load(tmp_path, {"messages": [ASKED, {**ANSWER, **mark}]})
    load(tmp_path, {"messages": [ASKED, {**ANSWER, **mark}]}, require_output=False)  # to ask, not to learn
    example = load(tmp_path, {"messages": [ASKED, {**ANSWER, **mark}, ASKED, {**ANSWER, name: 1}]})
    tokenizer = byte_tokenizer(CHATML)
    encode(example, tokenizer, max_length=999, context_length=None)
    with pytest.raises(
        DataError, match="marks a turn as not to be learnt, but loss_on all learns every turn"
    ):
        encode(example, tokenizer, max_length=999, context_length=None, loss_on="all")
    with pytest.raises(DataError, match=rf"field '{name}' is 0\.5\. A turn is learnt .* or not"):
        load(tmp_path, {"messages": [ASKED, {**ANSWER, name: 0.5}]})


def test_system_and_history_of_alpaca_rows_stand_before_the_instruction(tmp_path: Path) -> None:
    row = {"system": "Answer in Welsh.", "history": [["Good morning?", "Bore da."]]}
    example = load(tmp_path, {**row, "instruction": "And good night?", "output": "Nos da."})
    assert prompt_text(example) == (
        "Answer in Welsh.\n\n### Instruction:\nGood morning?\n\n### Response:\nBore da.\n\n"
        "### Instruction:\nAnd good night?\n\n### Response:\n"
    )
    with pytest.raises(DataError, match=r"'history' is \['a'\]\. Write a list of \[instruction, response\]"):
        load(tmp_path, {"history": ["a"], "instruction": "b", "output": "c"})


def test_a_system_column_is_the_first_turn_of_a_chat(tmp_path: Path) -> None:
    chat = load(tmp_path, {"system": "Be brief.", "messages": [ASKED, ANSWER]})
    spoken = load(tmp_path, {"messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWER]})
    assert chat == spoken
    assert (
        load(
            tmp_path,
            {"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWER]},
        )
        == spoken
    )
    with pytest.raises(DataError, match=r"field 'system' is 'Be long\.', but messages\[0\] is the system's"):
        load(
            tmp_path,
            {"system": "Be long.", "messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWER]},
        )


def test_sharegpt_rows_are_chats(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": ASKED["content"]},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "06:12"},
            {"from": "gpt", "value": "At 06:12."},
        ]
    }
    spoken = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            ASKED,
            CALLED,
            {"role": "tool", "content": "06:12"},
            ANSWER,
        ]
    }
    assert load(tmp_path, row) == load(tmp_path, spoken)
    with pytest.raises(DataError, match=r"conversations\[0\]: 'from' is 'bard'\. Known: system, human"):
        load(tmp_path, {"conversations": [{"from": "bard", "value": "x"}]})


def test_text_parts_are_one_text_and_images_are_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "High water"}, {"type": "text", "text": "in Whitby?"}]
    example = load(tmp_path, {"messages": [{**ASKED, "content": parts}, ANSWER]})
    assert example.messages[0].content == "High water\nin Whitby?"
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(DataError, match=r"messages\[0\]: field 'content' has a part of type 'image_url'"):
        load(tmp_path, {"messages": [{**ASKED, "content": picture}, ANSWER]})


ALPACA = {"instruction": "Say hi.", "output": "hi"}


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({**ALPACA, "tools": [TABLE]}, "tools"),
        ({**ALPACA, "images": ["a.png"]}, "images"),
        ({**ALPACA, "reasoning_content": "because"}, "reasoning_content"),
        ({**ALPACA, "system_prompt": "Be brief."}, "system_prompt"),
        ({"prompt": "a", "completion": "b", "system": "Be brief."}, "system"),
        ({"prompt": "a", "completion": "b", "history": [["a", "b"]]}, "history"),
        ({"messages": [ASKED, ANSWER], "documents": [{"title": "a", "text": "b"}]}, "documents"),
        ({"messages": [ASKED, {**ANSWER, "function_call": {"name": "f"}}]}, "function_call"),
    ],
)
def test_a_field_that_its_form_does_not_use_is_refused_by_name(
    row: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=rf"x\.jsonl:1.*: field '{field}' is .*, which changes what the row means"
    ):
        load(tmp_path, row)
    assert load(tmp_path, {**ALPACA, field: None}).output == "hi"  # a column that is empty here


def test_other_fields_of_turns_are_named_as_unused(tmp_path: Path) -> None:
    notes = DataNotes()
    load(tmp_path, {"messages": [{**ASKED, "id": 7}, ANSWER], "id": 3}, notes=notes)
    assert notes.lines() == ["columns not used: id, messages[].id"]


@pytest.mark.parametrize(
    ("turn", "part"),
    [
        ({"role": "assistant", "tool_calls": "f"}, "'tool_calls' is 'f'. Write a list"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "Write a list of"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]},
            "'arguments' is '{', not JSON",
        ),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "Only the assistant calls"),
        ({"role": "user", "content": None}, "'content' is None (null)"),
        ({"role": "user", "content": "a", "name": 3}, "'name' is 3 (a number)"),
    ],
)
def test_broken_turns_are_one_line(turn: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, {"messages": [ASKED, turn]})
    assert part in str(caught.value)
    assert "messages[1]" in str(caught.value)


def test_a_call_cannot_be_learnt_where_the_template_rewrites_the_conversation(tmp_path: Path) -> None:
    rewriting = "{{ messages | length }} turns {{ messages | tojson }}"
    example = load(tmp_path, {"messages": [ASKED, CALLED]})
    with pytest.raises(DataError, match="field 'tool_calls' of the answer cannot be learnt"):
        encode(example, byte_tokenizer(rewriting), max_length=999, context_length=None)
    assert "turns" in render_prompt(example, byte_tokenizer(rewriting))
