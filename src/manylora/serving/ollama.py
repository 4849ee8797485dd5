"""A Modelfile for Ollama: the model's file, a task's LoRA, the prompt it was trained with, and where answers end.

Ollama reads no Jinja: its templates are Go's. The chat template's fixed parts are found by rendering it for messages of
known text, and what is made of them is compared with the chat template again; one that is more than such parts is
refused. See https://docs.ollama.com/modelfile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from manylora.data.examples import Example
from manylora.data.prompts import prompt_text
from manylora.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptForm: TypeAlias = Literal["chat", "alpaca", "none"]

_REMEDY = "serve it with llama-server, which reads the chat template itself"
_PROBES = ("Sys7q", "One7q", "Two7q", "Three7q", "Four7q", "Five7q")
"""Text that no template holds itself."""


@dataclass(frozen=True, kw_only=True)
class ChatParts:
    """The fixed text of a chat template around what its messages say."""

    before_system: str | None
    """Up to the system message; None: the template takes none."""
    after_system: str
    """Up to the first `user`."""
    without_system: str
    """In the place of all that, where no system message is given."""
    user: str
    """Before what a user says."""
    answer: str
    """From there to the assistant's answer."""
    given: str
    """Between that and an answer of an earlier turn."""
    end: str
    """Behind an answer that is followed by a further turn."""

    def rendered(self, turns: Sequence[str], system: str | None = None) -> str:
        """The prompt for user and assistant in turns, the user first and last."""
        text = self.without_system if system is None else f"{self.before_system}{system}{self.after_system}"
        for place, turn in enumerate(turns):
            text += self.given + turn + self.end if place % 2 else self.user + turn + self.answer
        return text

    def template(self) -> str:
        """The same as Go's text/template; no action trims, since the fixed text has line ends of its own."""
        start = _literal(self.without_system)
        if self.before_system is not None:
            given = f"{_literal(self.before_system)}{{{{ .System }}}}{_literal(self.after_system)}"
            start = f"{{{{ if .System }}}}{given}{{{{ else }}}}{start}{{{{ end }}}}"
        return (
            f'{start}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}'
            f"{_literal(self.user)}{{{{ .Content }}}}{_literal(self.answer)}"
            f'{{{{ else if eq .Role "assistant" }}}}{_literal(self.given)}{{{{ .Content }}}}{_literal(self.end)}'
            "{{ end }}{{ end }}"
        )


def modelfile(
    model: str, *, adapter: str | None, prompt: PromptForm, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The text of a Modelfile; `ollama create NAME -f Modelfile` makes a model of it.

    Args:
        model: the model's GGUF file, as seen from the Modelfile ("./base.gguf").
        adapter: the LoRA's GGUF file, or None for a merged or bare model.
        prompt: how the adapter's training rows were written: through the chat template, in the Alpaca form, or as
            they stand.
        tokenizer: the base's.

    Raises:
        ConfigError: an unknown form.
        ModelError: no chat template, or one that Go's templates cannot express part by part.
    """
    if prompt == "chat":
        template = chat_parts(tokenizer).template()
    elif prompt == "alpaca":
        template = _literal(prompt_text(Example(task="", instruction=_PROBES[1], output="")))
        template = template.replace(_PROBES[1], "{{ .Prompt }}")
    elif prompt == "none":
        template = "{{ .Prompt }}"
    else:
        raise ConfigError(f"Prompt form {prompt!r} is unknown. Choose chat, alpaca or none.")
    if '"""' in template:
        raise ModelError(
            f"The prompt holds three quotation marks, which end a Modelfile's template; {_REMEDY}."
        )
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f'TEMPLATE """{template}"""')
    lines.append("PARAMETER temperature 0")  # as `manylora predict`: the likeliest token each time
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """Fixed text in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def chat_parts(tokenizer: PreTrainedTokenizerBase) -> ChatParts:
    """The parts of the tokenizer's chat template, without the begin token where the tokenizer adds that itself.

    Raises:
        ModelError: no chat template, or one that is more than fixed parts around messages.
    """
    if not tokenizer.chat_template:
        raise ModelError("The tokenizer has no chat template; write the prompts in another form.")
    if "strftime_now" in str(tokenizer.chat_template):
        raise ModelError(f"The chat template writes today's date, which Go's templates cannot; {_REMEDY}.")
    system, one, two, three, four, five = _PROBES
    head, after_one, after_two, answer = _around(_render(tokenizer, [one, two, three]), one, two, three)
    try:
        begin, middle, _ = _around(_render(tokenizer, [one], system), system, one)
    except ModelError:
        begin, middle = None, ""
    user = _common_end([head, after_two, *([middle] if begin is not None else [])])
    parts = ChatParts(
        before_system=begin,
        after_system=middle.removesuffix(user),
        without_system=head.removesuffix(user),
        user=user,
        answer=answer,
        given=after_one.removeprefix(answer),
        end=after_two.removesuffix(user),
    )
    for turns in ([one], [one, two, three], [one, two, three, four, five]):
        for text in (None, *([system] if begin is not None else [])):
            if parts.rendered(turns, text) != _render(tokenizer, turns, text):
                raise ModelError(f"The chat template is more than fixed parts around messages; {_REMEDY}.")
    if tokenizer.bos_token and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return _without_first(parts, str(tokenizer.bos_token))
    return parts


def _without_first(parts: ChatParts, bos: str) -> ChatParts:
    """The parts where the prompt's first begin token is added by the tokenizer; those of later turns stay."""
    user, moved = parts.user, ""
    if user.startswith(bos):
        user, moved = user.removeprefix(bos), bos
    before = parts.before_system
    return ChatParts(
        before_system=None if before is None else before.removeprefix(bos),
        after_system=parts.after_system + moved,
        without_system=(parts.without_system + moved).removeprefix(bos),
        user=user,
        answer=parts.answer,
        given=parts.given,
        end=parts.end + moved,
    )


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], system: str | None = None) -> str:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "assistant" if n % 2 else "user", "content": turn} for n, turn in enumerate(turns)]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is foreign code and refuses messages with whatever it likes
        raise ModelError(f"The chat template refuses plain messages; {_REMEDY}.") from error


def _around(text: str, *probes: str) -> list[str]:
    """What stands before, between and behind the probes."""
    found = []
    for probe in probes:
        before, mark, text = text.partition(probe)
        if not mark or probe in text:
            raise ModelError(f"The chat template does not hold each message once, in order; {_REMEDY}.")
        found.append(before)
    return [*found, text]


def _common_end(texts: Sequence[str]) -> str:
    length = 0
    while all(len(text) > length for text in texts) and len({text[-length - 1] for text in texts}) == 1:
        length += 1
    return texts[0][len(texts[0]) - length :]
