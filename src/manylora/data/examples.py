"""One row of any data set, in the one shape that every other room reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Form: TypeAlias = Literal["alpaca", "prompt", "chat"]
Words: TypeAlias = Literal["all", "published"]
"""What ROUGE-1 counts as words; see `manylora.evaluation.rouge1`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else the turn says, under the names that chat templates read: tool_calls, tool_call_id, name,
    reasoning_content."""
    learnt: bool = True
    """False where the row marks the turn as one not to be learnt (weight 0)."""

    def to_dict(self) -> dict[str, Any]:
        """As chat templates take a turn."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One prompt and the answer that belongs to it."""

    task: str
    instruction: str = ""
    """Alpaca instruction; the whole prompt, verbatim, where `form` is "prompt"."""
    input: str = ""
    """Alpaca input; may be empty."""
    system: str = ""
    """Alpaca: text that stands before everything else."""
    history: tuple[tuple[str, str], ...] = ()
    """Alpaca: earlier instructions and their responses."""
    output: str = ""
    """The reference answer, which the model is trained to write."""
    answer: str | None = None
    """Gold label of the rule-based metrics (the `answer` field of the reasoning files)."""
    messages: tuple[Message, ...] = ()
    """Where `form` is "chat": every turn before the answer."""
    answer_fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Where `form` is "chat": what the answer's turn says beside its text (see `Message.fields`)."""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """Where `form` is "chat": the tools that the model may call, as JSON schemas."""
    thinks: bool = False
    """Where `form` is "chat" and there is no answer to see it by: whether the model begins its answer itself, with a
    thought, where its chat template would else put an empty one before it."""
    form: Form = "alpaca"
    origin: str = ""
    """Where the row came from ("train.jsonl:12"), for error messages."""

    @property
    def answer_key(self) -> str:
        """Equal for rows with the same answer: the output, with what its turn says besides, or else the gold label."""
        said = json.dumps(self.answer_fields, sort_keys=True, default=str) if self.answer_fields else ""
        return (self.output.strip() + said) or (self.answer or "")

    @property
    def has_answer(self) -> bool:
        """Whether there is something to learn: text, or a call of a tool."""
        return bool(self.output.strip() or self.answer_fields.get("tool_calls"))


TaskData: TypeAlias = Mapping[str, list[Example]]
"""Task name to its examples, in a stable order."""
