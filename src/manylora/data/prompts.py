"""Examples to prompts and token ids: what the model reads, and which tokens the loss counts.

The answer is never cut. Where a row is too long the prompt loses tokens from its left, so that the
question's end and the cue for the answer stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from manylora.data.examples import Example
from manylora.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn: TypeAlias = Literal["answer", "all"]

IGNORED_LABEL = -100
"""The label that torch's cross entropy skips by default (`ignore_index`)."""

MIN_PROMPT_TOKENS = 32
"""A prompt is not cut below this many tokens, unless it is shorter itself: less would ask nothing."""

_HEADER = "### Instruction:\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One training row of T tokens: the prompt's, then the answer's and the end-of-sequence token."""

    input_ids: list[int]
    """Length T."""
    labels: list[int]
    """Length T; `IGNORED_LABEL` where the loss does not count. Not shifted: causal models do that."""
    truncated: bool
    """Whether the prompt lost tokens."""
    prompt_length: int
    """How many of the T tokens are the prompt's."""
    origin: str = ""
    """Where the row came from, for error messages."""


def prompt_text(example: Example) -> str:
    """The prompt as plain text, the same for every model; a chat row's turns stand one after the other.

    For the Alpaca form this is the short template (instruction, optional input, response). What a model
    reads for a chat row depends on its chat template: see `render_prompt`.
    """
    if example.form == "chat":
        return "\n".join(f"{turn.role}: {turn.content}" for turn in example.messages)
    if example.form == "prompt":
        return example.instruction
    middle = f"### Input:\n{example.input}\n\n" if example.input else ""
    return f"{_HEADER}{example.instruction}\n\n{middle}### Response:\n"


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the model reads it, up to where the answer begins.

    Raises:
        DataError: a chat row, and the tokenizer has no chat template or the template refuses the row.
    """
    if example.form == "chat":
        return str(_apply_template(example, tokenizer, with_answer=False, tokenize=False))
    return prompt_text(example)


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context_length: int | None,
    loss_on: LossOn = "answer",
) -> Encoded:
    """A training row: prompt, answer and end of sequence, with the labels that the loss counts.

    Args:
        example: the row; its `output` is the answer.
        tokenizer: the base model's.
        max_length: tokens that a row should have at most. The prompt gives way down to `MIN_PROMPT_TOKENS`;
            a row whose answer is so long that this does not suffice is longer than `max_length`.
        context_length: tokens that the model can read, which no row exceeds; None where it has no such limit.
        loss_on: "answer" counts the answer and the end of sequence; "all" counts the prompt too.

    Raises:
        DataError: the answer is empty, or does not fit `context_length` beside `MIN_PROMPT_TOKENS` of the
            prompt.
        ModelError: the tokenizer has no end-of-sequence token.
        ConfigError: `max_length` or `loss_on` cannot be.
    """
    if loss_on not in ("answer", "all"):
        raise ConfigError(f"loss_on {loss_on!r} is unknown. Choose answer or all.")
    _check_length(max_length)
    if not example.output.strip():
        raise DataError(f"{_origin(example)} has no answer to train on. Give one or remove the row.")
    prompt = _prompt_ids(example, tokenizer)
    answer = _answer_ids(example, tokenizer, prompt)
    least = min(len(prompt), MIN_PROMPT_TOKENS)
    if context_length is not None and len(answer) + least > context_length:
        raise DataError(
            f"{_origin(example)}: the answer's {len(answer)} tokens and {least} of the prompt exceed the "
            f"model's context of {context_length}. Shorten the answer, remove the row or take a model that "
            "reads more."
        )
    room = max(max_length - len(answer), least)
    if context_length is not None:
        room = min(room, context_length - len(answer))
    kept = _cut(prompt, room, example, tokenizer)
    ids = kept + answer
    labels = list(ids) if loss_on == "all" else [IGNORED_LABEL] * len(kept) + answer
    return Encoded(
        input_ids=ids,
        labels=labels,
        truncated=len(kept) < len(prompt),
        prompt_length=len(kept),
        origin=example.origin,
    )


def encode_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[int], bool]:
    """The prompt's token ids for generation, at most `max_length`, and whether it lost any.

    Raises:
        DataError: see `render_prompt`.
        ConfigError: `max_length` is below 1.
    """
    _check_length(max_length)
    prompt = _prompt_ids(example, tokenizer)
    kept = _cut(prompt, max_length, example, tokenizer)
    return kept, len(kept) < len(prompt)


def _check_length(max_length: int) -> None:
    if max_length < 1:
        raise ConfigError(f"max_length {max_length} leaves no token. Take 1 or more.")


def _origin(example: Example) -> str:
    return example.origin or f"A row of task {example.task!r}"


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[int]:
    # verbose=False: no remark about long rows, which are cut here.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if example.form == "chat":  # the template writes the special tokens itself
        return list(_apply_template(example, tokenizer, with_answer=False, tokenize=True)["input_ids"])
    ids = _tokens(prompt_text(example), tokenizer, special=True)
    # Some tokenizers close every text with the end of sequence; the prompt goes on.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _answer_ids(example: Example, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "The tokenizer has no end-of-sequence token, so an answer could not end. Set tokenizer.eos_token."
        )
    if example.form == "chat":
        whole = list(_apply_template(example, tokenizer, with_answer=True, tokenize=True)["input_ids"])
        if len(whole) > len(prompt) and whole[: len(prompt)] == prompt:
            return _ended(whole[len(prompt) :], eos)
        # Where a token spans the border of prompt and answer, the texts may still part there.
        asked = render_prompt(example, tokenizer)
        told = str(_apply_template(example, tokenizer, with_answer=True, tokenize=False))
        if len(told) > len(asked) and told.startswith(asked):
            return _ended(_tokens(told[len(asked) :], tokenizer, special=False), eos)
    return [*_tokens(example.output, tokenizer, special=False), eos]


def _ended(answer: list[int], eos: int) -> list[int]:
    """The answer up to its last end of sequence (templates may write on behind it), or with one appended."""
    if eos not in answer:
        return [*answer, eos]
    return answer[: len(answer) - answer[::-1].index(eos)]


def _apply_template(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, with_answer: bool, tokenize: bool
) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{_origin(example)} is a chat row, but the tokenizer has no chat template. Take a chat model, "
            "set tokenizer.chat_template, or write the rows as prompt and completion."
        )
    turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
    if with_answer:
        turns.append({"role": "assistant", "content": example.output})
    try:
        return tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=not with_answer,
            tokenize=tokenize,
            return_dict=tokenize,  # the default differs between versions of transformers
        )
    except Exception as error:  # a template is foreign code and refuses a row with whatever it likes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{_origin(example)}: the tokenizer's chat template refuses the row ({reason}). Change its roles."
        ) from error


def _cut(prompt: list[int], room: int, example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt in at most `room` tokens: its right end, behind its BOS and, if cheap, its header."""
    if len(prompt) <= room:
        return prompt
    head = 1 if prompt[0] == tokenizer.bos_token_id and room > 1 else 0
    if example.form == "alpaca":
        header = _tokens(_HEADER, tokenizer, special=False)
        stop = head + len(header)
        if stop <= room // 4 and prompt[head:stop] == header:
            head = stop
    return prompt[:head] + prompt[len(prompt) - (room - head) :]
