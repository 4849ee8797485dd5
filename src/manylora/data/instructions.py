"""How a row of instruction, input and output becomes a prompt: through the model's chat template, or as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from manylora.data.examples import Example, Form, Message
from manylora.data.sources import EMBEDDED
from manylora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template: TypeAlias = Literal["chat", "alpaca", "none"]
"""How instruction rows are asked: as a turn of the user's in the tokenizer's chat template, in the Alpaca form, or as
they stand."""
TemplateChoice: TypeAlias = Literal["auto", "chat", "alpaca", "none"]

FORM_OF: Mapping[Template, Form] = {"chat": "chat", "alpaca": "alpaca", "none": "prompt"}
"""The form that an instruction row has then."""


def resolve_template(choice: TemplateChoice, tokenizer: PreTrainedTokenizerBase, *, model: str) -> Template:
    """The template that a choice means with a tokenizer: auto is its own chat template, where it has one, else Alpaca.

    Args:
        choice: of the user.
        tokenizer: the base's.
        model: the base's name. The embedded base is asked in the Alpaca form, with which it was measured: its chat
            template is for chat rows.

    Raises:
        ConfigError: "chat", and the tokenizer has no chat template.
    """
    if choice == "auto":
        return "chat" if model != EMBEDDED and getattr(tokenizer, "chat_template", None) else "alpaca"
    check_template(choice, tokenizer)
    return choice


def check_template(template: Template | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that a tokenizer cannot write.

    Raises:
        ConfigError: "chat", and it has no chat template.
    """
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "template is chat, but the tokenizer has no chat template; take a chat model, or template alpaca or none."
        )


def apply_template(example: Example, template: Template) -> Example:
    """An instruction row in the form that `template` asks for; other rows, and "alpaca", pass as they are.

    chat: `system` and `history` become turns, the input stands below the instruction in the last one. none: system,
    earlier instructions and responses, instruction and input, an empty line between.
    """
    if example.form != "alpaca" or template == "alpaca":
        return example
    asked = "\n\n".join(text for text in (example.instruction, example.input) if text)
    if template == "none":
        before = [example.system, *(text for turn in example.history for text in turn)]
        return _without_fields(
            example, form="prompt", instruction="\n\n".join(text for text in [*before, asked] if text)
        )
    turns = [Message(role="system", content=example.system)] if example.system else []
    for earlier, response in example.history:
        turns += [Message(role="user", content=earlier), Message(role="assistant", content=response)]
    turns.append(Message(role="user", content=asked))
    return _without_fields(example, form="chat", messages=tuple(turns))


def _without_fields(
    example: Example, *, form: Form, instruction: str = "", messages: tuple[Message, ...] = ()
) -> Example:
    return dataclasses.replace(
        example, form=form, instruction=instruction, messages=messages, input="", system="", history=()
    )
