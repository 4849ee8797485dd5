"""The record of how prompts were made: what it holds, how it asks, and what a damaged one says."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from chats import CHATML, DATED, THOUGHT, byte_tokenizer
from manylora.data import (
    PROMPTS_FILE,
    Example,
    Message,
    PromptRecord,
    TaskPrompts,
    find_prompts,
    fix_date,
    question,
    render_prompt,
)
from manylora.errors import ConfigError, ModelError, RunError
from manylora.files import folder_sums, write_json


def chat(output: str = "so", system: str = "", **fields: Any) -> Example:
    turns = [Message(role="system", content=system)] if system else []
    messages = (*turns, Message(role="user", content="why?"))
    return Example(task="t", form="chat", messages=messages, output=output, answer_fields=fields)


ALPACA = Example(task="t", instruction="why?", output="so")
PLAIN = Example(task="t", form="prompt", instruction="why?", output="so")


def record(template: str | None = CHATML, date: str | None = None, **tasks: list[Example]) -> PromptRecord:
    return PromptRecord.of(tasks, byte_tokenizer(template), date=date, max_length=99)


def test_each_task_has_the_form_of_most_of_its_rows() -> None:
    found = record(a=[ALPACA, ALPACA, PLAIN], b=[PLAIN], c=[chat()])
    assert {name: task.form for name, task in found.tasks.items()} == {
        "a": "alpaca",
        "b": "prompt",
        "c": "chat",
    }
    assert (found.template, found.max_length) == (CHATML, 99)
    assert record(a=[ALPACA]).template is None  # which no row went through
    assert found.only(["b"]).tasks.keys() == {"b"}
    assert found.only([""]).tasks.keys() == {"a", "b", "c"}


def test_a_system_text_counts_where_all_rows_have_it() -> None:
    assert record(c=[chat(system="Be brief."), chat(system="Be brief.")]).tasks["c"].system == "Be brief."
    assert record(c=[chat(system="Be brief."), chat()]).tasks["c"].system == ""


def test_answers_that_bring_their_own_thought_are_known() -> None:
    thoughts = [chat(reasoning_content="hm"), chat(reasoning_content="hm"), chat()]
    found = record(THOUGHT, c=thoughts)
    assert found.tasks["c"].thinks
    assert found.thinks("c")
    assert found.thinks("of no name")
    assert not record(THOUGHT, c=[chat(), chat()]).thinks("c")


def test_questions_have_the_form_of_the_training() -> None:
    tokenizer = byte_tokenizer(THOUGHT)
    opened = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    cases = [
        (TaskPrompts(form="alpaca"), "### Instruction:\nwhy?\n\n### Response:\n"),
        (TaskPrompts(form="prompt"), "why?"),
        (TaskPrompts(form="chat"), f"<|im_start|>user\nwhy?<|im_end|>\n{opened}"),
        (TaskPrompts(form="chat", thinks=True), "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"),
        (
            TaskPrompts(form="chat", system="Be brief."),
            f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n{opened}",
        ),
    ]
    for prompts, wanted in cases:
        assert render_prompt(question("why?", prompts), tokenizer) == wanted
    with_input = render_prompt(question("Add.", TaskPrompts(form="chat"), input_text="2 3"), tokenizer)
    assert "user\nAdd.\n\n2 3<|im_end|>" in with_input
    with pytest.raises(ConfigError, match="--input belongs to Alpaca and chat prompts"):
        question("why?", TaskPrompts(form="prompt"), input_text="2 3")


def test_tasks_of_several_forms_want_a_name() -> None:
    found = record(a=[ALPACA], c=[chat()])
    assert found.prompts_of("c") == TaskPrompts(form="chat")
    with pytest.raises(
        ConfigError, match=r"different forms \(a alpaca, c chat\); name one with --task, or give --form"
    ):
        found.prompts_of(None)
    assert record(a=[ALPACA], b=[ALPACA]).prompts_of(None) == TaskPrompts(form="alpaca")
    assert PromptRecord(tasks={}).prompts_of(None) is None


def test_what_is_written_is_read_back_and_gives_the_same_prompts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(DATED)
    fix_date(tokenizer, "2024-02-29")
    written = PromptRecord.of({"c": [chat()]}, tokenizer, date="2024-02-29", max_length=99)
    assert written.template == DATED
    written.write(tmp_path)
    read = PromptRecord.read(tmp_path)
    assert read == written
    other = byte_tokenizer(CHATML)  # such as that of a base that has another template by now
    read.prepare(other)
    assert render_prompt(chat(), other) == render_prompt(chat(), tokenizer)


def test_a_folder_without_a_record_says_nothing_or_has_a_tokenizer_beside_a_foreign_lora(
    tmp_path: Path,
) -> None:
    assert find_prompts(tmp_path) is None
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "MANYLORA"}), encoding="utf-8")
    assert (
        find_prompts(tmp_path) is None
    )  # an earlier version wrote the base's tokenizer, whatever the rows were
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    found = find_prompts(tmp_path)
    assert found is not None
    assert (found.prompts_of(None), found.template) == (
        TaskPrompts(form="chat", instructions="chat"),
        CHATML,
    )


GOOD = {"version": 1, "tasks": {}, "template": None, "date": None, "max_length": 9}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "[" * 9999, "\u00ff"]
    + [
        json.dumps({**GOOD, **change})
        for change in (
            {"version": 2},
            {"tasks": []},
            {"tasks": {"a": 3}},
            {"tasks": {"a": {"form": "poem", "system": "", "thinks": False}}},
            {"tasks": {"a": {"form": "chat", "system": 3, "thinks": False}}},
            {"tasks": {"a": {"form": "chat", "system": "", "thinks": "no"}}},
            {"template": 5},
            {"template": {"default": 5}},
            {"date": "soon"},
            {"max_length": 0},
            {"max_length": True},
            {"base_fingerprint": ""},
            {"base_fingerprint": 5},
            {"template": "\ud800"},
            {"tasks": {"a": {"form": "chat", "system": "\udfff", "thinks": False}}},
        )
    ],
)
def test_a_damaged_record_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / PROMPTS_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ModelError, match=rf"{PROMPTS_FILE} (is damaged|cannot be read) \(.*\); remove it to go on without\.$"
    ):
        PromptRecord.read(tmp_path)


@pytest.mark.parametrize("field", ["version", "template", "date", "max_length", "form", "system", "thinks"])
def test_a_field_that_is_gone_is_no_default(field: str, tmp_path: Path) -> None:
    task = {"form": "chat", "system": "Be brief.", "thinks": False}
    record = {**GOOD, "tasks": {"a": task}}
    for part in (record, task):
        part.pop(field, None)
    (tmp_path / PROMPTS_FILE).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(
        ModelError, match=rf"is damaged \((tasks\.a\.)?{field}.*(missing|required)\); remove it"
    ):
        PromptRecord.read(tmp_path)


def test_what_is_wrong_with_a_record_names_the_value(tmp_path: Path) -> None:
    for change, said in (
        ({"date": "foo"}, r"\(date: date is 'foo'; give a day as YYYY-MM-DD"),
        ({"max_length": 0}, r"\(max_length: .*, not 0\)"),
        ({"version": 2}, r"\(version: .*, not 2\)"),
        ({"template": {"default": 5}}, r"\(template\.default: .*, not 5\)|\(template: "),
    ):
        (tmp_path / PROMPTS_FILE).write_text(json.dumps({**GOOD, **change}), encoding="utf-8")
        with pytest.raises(ModelError, match=said):
            PromptRecord.read(tmp_path)


def test_the_good_record_is_read(tmp_path: Path) -> None:
    (tmp_path / PROMPTS_FILE).write_text(json.dumps(GOOD), encoding="utf-8")
    assert PromptRecord.read(tmp_path) == PromptRecord(tasks={}, max_length=9)


def test_a_record_that_its_run_noted_is_checked_and_missed(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    byte_tokenizer(CHATML).save_pretrained(folder)
    written = record(a=[ALPACA])
    written.write(folder)
    names = [f"adapter/{path.name}" for path in folder.iterdir()]
    write_json(tmp_path / "state.json", {"files": folder_sums(tmp_path, names)})
    assert find_prompts(folder) == written
    written.model_copy(update={"max_length": 3}).write(folder)
    for _ in range(2):
        with pytest.raises(RunError, match=rf"{PROMPTS_FILE} is (broken or was changed|missing)"):
            find_prompts(folder)
        (folder / PROMPTS_FILE).unlink(missing_ok=True)
    state = json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))
    del state["files"][f"adapter/{PROMPTS_FILE}"]
    write_json(tmp_path / "state.json", state)
    assert find_prompts(folder) is not None
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(RunError, match="chat_template"):
        find_prompts(folder)


def test_the_mark_of_a_base_goes_along_and_records_without_one_are_as_they_were(tmp_path: Path) -> None:
    plain = record(a=[ALPACA])
    assert "base_fingerprint" not in plain.to_dict()
    marked = plain.with_mark("v2:abc")
    marked.write(tmp_path)
    assert PromptRecord.read(tmp_path) == marked
    assert marked.only(["a"]).base_fingerprint == "v2:abc"


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
LOOPS = NESTED + "{% endfor %}" * 3
AFTER_AN_ANSWER = (
    CHATML + "{% if messages[-1].role == 'assistant' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}"
)


@pytest.mark.parametrize("template", [LOOPS, AFTER_AN_ANSWER])
@pytest.mark.parametrize("output", ["so", ""])
def test_a_stranger_s_template_that_does_not_end_is_one_line(
    template: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.data.templates._SECONDS", 0.5)
    tokenizer = byte_tokenizer(CHATML)
    PromptRecord(tasks={}, template=template).prepare(tokenizer)
    began = time.process_time()
    with pytest.raises(
        ModelError, match=r"chat template takes more than 0\.5 s over this row: it loops"
    ) as caught:
        render_prompt(chat(output), tokenizer)
    assert time.process_time() - began < 5
    assert "\n" not in str(caught.value)


def test_a_template_is_rendered_in_another_thread_and_no_timer_stays() -> None:
    tokenizer = byte_tokenizer(CHATML)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(render_prompt(chat(), tokenizer)))
    thread.start()
    thread.join()
    assert found == [render_prompt(chat(), tokenizer)]
    if hasattr(signal, "setitimer"):
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
