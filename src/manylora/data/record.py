"""Which form a run's prompts had, kept beside its adapter, so that whoever uses it asks as it was trained.

ADAPTER/manylora_prompts.json    per task: form, system text, whether answers think, how instructions were
                                 asked; chat template, date, cut-off; beside a plain LoRA, whose settings have no
                                 place for it, the mark of its base
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from manylora.data.examples import Example, Form, TaskData
from manylora.data.instructions import Template, apply_template
from manylora.data.sampling import sample_rows
from manylora.data.templates import chat_text, check_date, fix_date, plain_template
from manylora.errors import ConfigError, ModelError
from manylora.files import Record, check_noted, read_json, read_record, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_FILE = "manylora_prompts.json"
"""Name of the file in an adapter's folder."""

_ASKED = 200
"""Rows by which it is seen whether most answers think."""


class TaskPrompts(Record):
    """How a task's rows asked."""

    form: Form
    """Of most of its rows."""
    system: str = ""
    """The system text that all its rows had in common."""
    thinks: bool = False
    """Chat: whether most answers began with a thought of their own (see `Example.thinks`)."""
    instructions: Template = "alpaca"
    """How rows of instruction and input were asked; those of earlier versions in the Alpaca form."""

    @classmethod
    def of(
        cls, rows: list[Example], tokenizer: PreTrainedTokenizerBase, *, instructions: Template
    ) -> TaskPrompts:
        """What the rows of one task have in common, to which `instructions` has been applied."""
        (form, _), *_ = Counter(row.form for row in rows).most_common(1)
        own = [row for row in rows if row.form == form]
        systems = {_system_of(row) for row in own}
        asked = sample_rows(own, _ASKED, task="") if form == "chat" else []
        thinking = sum(chat_text(row, tokenizer).thinks for row in asked)
        return cls(
            form=form,
            system=systems.pop() if len(systems) == 1 else "",
            thinks=2 * thinking > len(asked) > 0,
            instructions=instructions,
        )


def _system_of(row: Example) -> str:
    if row.form != "chat":
        return row.system
    return row.messages[0].content if row.messages and row.messages[0].role == "system" else ""


class PromptRecord(Record):
    """How the prompts of an adapter's training were made."""

    version: Literal[1] = 1
    tasks: dict[str, TaskPrompts]
    """Empty where only `template` is known."""
    template: str | dict[str, str] | None = None
    """The chat template, or templates by name, as the tokenizer's authors wrote it; None where no row was a chat."""
    date: Annotated[str | None, AfterValidator(check_date)] = None
    """The day that the template was told, YYYY-MM-DD; None where it does not ask."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens that a row might have."""
    base_fingerprint: str | None = Field(default=None, min_length=1)
    """The mark of the base that a plain LoRA was trained on; `ManyLoraConfig` has its own."""

    @classmethod
    def of(
        cls,
        data: TaskData,
        tokenizer: PreTrainedTokenizerBase,
        *,
        date: str | None,
        max_length: int,
        instructions: Template = "alpaca",
    ) -> PromptRecord:
        """The record of training rows as this tokenizer writes them.

        Args:
            data: the rows, `instructions` applied to them.
            tokenizer: of the base.
            date: that the chat template was told.
            max_length: tokens that a row might have.
            instructions: how rows of instruction and input were asked.
        """
        tasks = {
            task: TaskPrompts.of(rows, tokenizer, instructions=instructions) for task, rows in data.items()
        }
        chat = any(row.form == "chat" for rows in data.values() for row in rows)
        return cls(
            tasks=tasks,
            template=plain_template(tokenizer) if chat else None,
            date=date if chat else None,
            max_length=max_length,
        )

    def only(self, tasks: list[str]) -> PromptRecord:
        """The same of these tasks alone; all, where none of them is known."""
        kept = {task: self.tasks[task] for task in tasks if task in self.tasks}
        return self.model_copy(update={"tasks": kept or self.tasks})

    def with_mark(self, base_fingerprint: str | None) -> PromptRecord:
        """The same with another mark of the base, or none."""
        return self.model_copy(update={"base_fingerprint": base_fingerprint})

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give a tokenizer the chat template and the date of the training."""
        if self.template is not None:
            template = self.template
            tokenizer.chat_template = template if isinstance(template, str) else dict(template)
        if self.date is not None:
            fix_date(tokenizer, self.date)

    def prompts_of(self, task: str | None) -> TaskPrompts | None:
        """How to ask for `task`, or for any; None where nothing is known.

        Raises:
            ConfigError: the tasks were asked in different forms, and none of them is named.
        """
        if task is not None and task in self.tasks:
            return self.tasks[task]
        found = list(self.tasks.values())
        if len({prompts.form for prompts in found}) > 1:
            shown = ", ".join(f"{name} {prompts.form}" for name, prompts in self.tasks.items())
            raise ConfigError(
                f"The adapter's tasks were asked in different forms ({shown}); name one with --task, or give --form."
            )
        if not found:
            return None
        same = {prompts.system for prompts in found}
        return TaskPrompts(
            form=found[0].form,
            system=same.pop() if len(same) == 1 else "",
            thinks=self.thinks(""),
            instructions=self.instructions_of(""),
        )

    def instructions_of(self, task: str) -> Template:
        """How instruction rows of `task` are asked; where it is unknown, as those of all tasks are, else in the Alpaca
        form."""
        found = {prompts.instructions for prompts in self.tasks.values()}
        if task in self.tasks:
            return self.tasks[task].instructions
        return found.pop() if len(found) == 1 else "alpaca"

    def thinks(self, task: str) -> bool:
        """Whether most answers to chats of `task`, or of any where it is unknown, began with a thought."""
        known = self.tasks.get(task)
        found = [known] if known else [prompts for prompts in self.tasks.values() if prompts.form == "chat"]
        return 2 * sum(prompts.thinks for prompts in found) > len(found)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return self.model_dump(exclude={"base_fingerprint"} if self.base_fingerprint is None else None)

    def write(self, folder: Path) -> None:
        """Put the record into an adapter's folder."""
        write_json(folder / PROMPTS_FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> PromptRecord | None:
        """The record of an adapter's folder; None where it has none, as those of earlier versions.

        Raises:
            ModelError: it is damaged.
            RunError: it is not what the folder's run wrote.
        """
        path = folder / PROMPTS_FILE
        check_noted(path)
        if not path.is_file():
            return None
        remedy = "remove it to go on without"
        found = read_record(path, cls, remedy=remedy, error=ModelError)
        for place, part in (("", found), *((f"tasks.{name}.", task) for name, task in found.tasks.items())):
            # A field that is gone is no default: what is asked without its system text gets other answers.
            optional = {"base_fingerprint", "instructions"}
            if missing := sorted(type(part).model_fields.keys() - part.model_fields_set - optional):
                raise ModelError(f"{path} is damaged ({place}{missing[0]} is missing); {remedy}.")
        return found


def find_prompts(folder: Path) -> PromptRecord | None:
    """How to ask an adapter, from what stands in its folder: its record, or else, beside a LoRA of another program, a
    tokenizer with a chat template, which says that it was trained on chats. None where nothing is known.

    Raises:
        ModelError: the record is damaged.
        RunError: a file is not what the folder's run wrote.
    """
    record = PromptRecord.read(folder)
    if record is not None or _json_at(folder / "adapter_config.json").get("peft_type") != "LORA":
        return record
    template = _template_beside(folder)
    prompts = TaskPrompts(form="chat", instructions="chat")
    return PromptRecord(tasks={"": prompts}, template=template) if template else None


def _template_beside(folder: Path) -> str | None:
    """The chat template of a tokenizer that was saved into the folder."""
    check_noted(folder / "chat_template.jinja")
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        template = _json_at(folder / "tokenizer_config.json").get("chat_template")
        return template if isinstance(template, str) else None


def _json_at(path: Path) -> dict[str, Any]:
    check_noted(path)
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def question(text: str, prompts: TaskPrompts, *, input_text: str = "", task: str = "") -> Example:
    """A text as the prompt that rows of these had.

    Alpaca: the instruction. Chat: one turn of the user's, the input below it. Prompt: as it stands; the input below
    it, where rows of instructions were asked so.

    Raises:
        ConfigError: an input beside a prompt that is taken as it stands.
    """
    asked = Example(task=task, instruction=text, input=input_text, system=prompts.system, origin="the prompt")
    if prompts.form == "chat":
        return dataclasses.replace(apply_template(asked, "chat"), thinks=prompts.thinks)
    if prompts.form == "alpaca":
        return asked
    if input_text and prompts.instructions != "none":
        raise ConfigError("--input belongs to Alpaca and chat prompts; write it into the prompt.")
    return apply_template(dataclasses.replace(asked, system=""), "none")
