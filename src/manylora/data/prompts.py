"""Examples to prompts and token ids: what the model reads, and which tokens the loss counts.

The answer is never cut. Where a row is too long the prompt loses tokens from its left, so that the
question's end and the cue for the answer stay.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from manylora.data.examples import Example, Message
from manylora.data.templates import ChatText, chat_text, earlier_turn, marked_tokens, origin_of
from manylora.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn: TypeAlias = Literal["answer", "assistant", "all"]

IGNORED_LABEL = -100
"""The label that torch's cross entropy skips by default (`ignore_index`)."""

MIN_PROMPT_TOKENS = 32
"""A prompt is not cut below this many tokens, unless it is shorter itself: less would ask nothing."""

_HEADER = "### Instruction:\n"
_CUE = "### Response:\n"


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

    For the Alpaca form this is the short template (instruction, optional input, response); a `system` text stands
    before it, earlier turns as instruction and response between. What a model reads for a chat row depends on its
    chat template: see `render_prompt`.
    """
    if example.form == "chat":
        tools = [f"tools: {json.dumps(list(example.tools))}"] if example.tools else []
        return "\n".join([*tools, *map(_turn_text, example.messages)])
    if example.form == "prompt":
        return example.instruction
    system = f"{example.system}\n\n" if example.system else ""
    history = "".join(f"{_HEADER}{asked}\n\n{_CUE}{told}\n\n" for asked, told in example.history)
    middle = f"### Input:\n{example.input}\n\n" if example.input else ""
    return f"{system}{history}{_HEADER}{example.instruction}\n\n{middle}{_CUE}"


def _turn_text(turn: Message) -> str:
    calls = turn.fields.get("tool_calls")
    return f"{turn.role}: {turn.content}" + (f" {json.dumps(calls)}" if calls else "")


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the model reads it, up to where the answer begins.

    Raises:
        DataError: a chat row, and the tokenizer has no chat template, or one that refuses the row or does not read
            what changes its meaning.
    """
    return chat_text(example, tokenizer).prompt if example.form == "chat" else prompt_text(example)


def answer_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The row's answer as a model without fault writes it: what generated text is compared with.

    That is `output`, but for an answer that calls tools or thinks, which the chat template puts into words, and for
    special tokens in the text, which are no part of what is read.

    Raises:
        DataError: see `encode`.
    """
    said = example.form == "chat" and example.answer_fields
    if not said and not any(token in example.output for token in tokenizer.all_special_tokens):
        return example.output.strip()
    chat = chat_text(example, tokenizer) if example.form == "chat" else None
    text = _read(_answer_ids(example, tokenizer, chat), tokenizer)
    return without_closing(text, closing_text(example, tokenizer, chat))


def closing_text(example: Example, tokenizer: PreTrainedTokenizerBase, chat: ChatText | None = None) -> str:
    """What a chat template writes after an answer for people to read, special tokens apart; mostly nothing.

    A model learns it, since that is how an answer ends, but it is no part of the answer.
    """
    if example.form != "chat":
        return ""
    chat = chat or chat_text(example, tokenizer)
    return _read(_tokens(chat.closing, tokenizer, special=False), tokenizer)


def without_closing(text: str, closing: str) -> str:
    """A generated answer without what the template writes after one."""
    return (text.removesuffix(closing) if closing else text).strip()


def _read(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context_length: int | None,
    loss_on: LossOn = "answer",
    vocabulary: int | None = None,
) -> Encoded:
    """A training row: prompt, answer and end of sequence, with the labels that the loss counts.

    Args:
        example: the row; its `output` is the answer.
        tokenizer: the base model's.
        max_length: tokens that a row should have at most. The prompt gives way down to `MIN_PROMPT_TOKENS`;
            a row whose answer is so long that this does not suffice is longer than `max_length`.
        context_length: tokens that the model can read, which no row exceeds; None where it has no such limit.
        loss_on: "answer" counts the answer and the end of sequence; "assistant" also the earlier turns of the
            assistant's, each with its end, but those that the row marks as not to be learnt; "all" counts the prompt
            too.
        vocabulary: rows of the model's embedding; ids beyond are refused. None: not looked at.

    Raises:
        DataError: the answer is empty, or does not fit `context_length` beside `MIN_PROMPT_TOKENS` of the
            prompt; a token has no row in the model; the tokens of a turn that is to be learnt cannot be told; or see
            `render_prompt`.
        ModelError: the tokenizer has no end-of-sequence token.
        ConfigError: `max_length` or `loss_on` cannot be.
    """
    if loss_on not in ("answer", "assistant", "all"):
        raise ConfigError(f"loss_on {loss_on!r} is unknown. Choose answer, assistant or all.")
    _check_length(max_length)
    if not example.has_answer:
        raise DataError(f"{origin_of(example)} has no answer to train on. Give one or remove the row.")
    if loss_on == "all" and not all(turn.learnt for turn in example.messages):
        raise DataError(
            f"{origin_of(example)} marks a turn as not to be learnt, but loss_on all learns every turn. Take loss_on "
            "answer, or remove the row."
        )
    chat = chat_text(example, tokenizer) if example.form == "chat" else None
    prompt = _prompt_ids(example, tokenizer, chat)
    answer = _answer_ids(example, tokenizer, chat, prompt)
    check_token_rows([*prompt, *answer], vocabulary, example, tokenizer)
    least = min(len(prompt), MIN_PROMPT_TOKENS)
    if context_length is not None and len(answer) + least > context_length:
        raise DataError(
            f"{origin_of(example)}: the answer's {len(answer)} tokens and {least} of the prompt exceed the "
            f"model's context of {context_length}. Shorten the answer, remove the row or take a model that "
            "reads more."
        )
    room = max(max_length - len(answer), least)
    if context_length is not None:
        room = min(room, context_length - len(answer))
    learnt = [loss_on == "all"] * len(prompt)
    if loss_on == "assistant":
        learnt = _assistant_tokens(example, tokenizer, chat, prompt)
    labels = [token if own else IGNORED_LABEL for token, own in zip(prompt, learnt, strict=True)]
    head, tail = _cut(prompt, room, example, tokenizer)
    kept = prompt[:head] + prompt[tail:]
    ids, labels = kept + answer, labels[:head] + labels[tail:] + answer
    return Encoded(
        input_ids=ids,
        labels=labels,
        truncated=len(kept) < len(prompt),
        prompt_length=len(kept),
        origin=example.origin,
    )


def encode_prompt(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    vocabulary: int | None = None,
) -> tuple[list[int], bool]:
    """The prompt's token ids for generation, at most `max_length`, and whether it lost any.

    Raises:
        DataError: see `render_prompt`; or a token has no row in the model, whose embedding has `vocabulary`.
        ConfigError: `max_length` is below 1.
    """
    _check_length(max_length)
    chat = chat_text(example, tokenizer) if example.form == "chat" else None
    prompt = _prompt_ids(example, tokenizer, chat)
    check_token_rows(prompt, vocabulary, example, tokenizer)
    head, tail = _cut(prompt, max_length, example, tokenizer)
    kept = prompt[:head] + prompt[tail:]
    return kept, len(kept) < len(prompt)


def _check_length(max_length: int) -> None:
    if max_length < 1:
        raise ConfigError(f"max_length {max_length} leaves no token. Take 1 or more.")


def check_token_rows(
    ids: list[int], vocabulary: int | None, example: Example, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse token ids that the tokenizer knows and the model has no row for.

    Raises:
        DataError: naming the row and the token.
    """
    if vocabulary is None or max(ids, default=0) < vocabulary:
        return
    beyond = max(ids)
    raise DataError(
        f"{origin_of(example)} gives the token {tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}), but the "
        f"model has rows for {vocabulary} tokens. Take the tokenizer and chat template of the model, or write the row "
        "without it."
    )


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[int]:
    # verbose=False: no remark about long rows, which are cut here.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, chat: ChatText | None) -> list[int]:
    # a chat template writes the special tokens itself
    text = prompt_text(example) if chat is None else chat.prompt
    ids = _tokens(text, tokenizer, special=chat is None)
    eos = tokenizer.eos_token_id
    if chat is None and len(ids) > 1 and ids[-1] == eos:
        # Some tokenizers close every text with the end of sequence; the prompt goes on. One that the text itself ends
        # with stays.
        bare = _tokens(text, tokenizer, special=False)
        ids = ids[: len(ids) - _ends(ids, eos)] + bare[len(bare) - _ends(bare, eos) :]
    return _begun_once(ids, tokenizer.bos_token_id)


def _answer_ids(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatText | None,
    prompt: list[int] | None = None,
) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "The tokenizer has no end-of-sequence token, so an answer could not end. Set tokenizer.eos_token."
        )
    if chat is None or chat.answer is None:
        if example.answer_fields.get("tool_calls"):
            raise DataError(
                f"{origin_of(example)}: field 'tool_calls' of the answer cannot be learnt, as the chat template writes "
                "the conversation anew when an answer comes. Write the call into the answer's text."
            )
        return [*_without_ends(_tokens(example.output, tokenizer, special=False), tokenizer), eos]
    prompt = _prompt_ids(example, tokenizer, chat) if prompt is None else prompt
    whole = _begun_once(_tokens(chat.prompt + chat.answer, tokenizer, special=False), tokenizer.bos_token_id)
    if len(whole) > len(prompt) and whole[: len(prompt)] == prompt:
        ids = whole[len(prompt) :]
    else:  # a token spans the border of prompt and answer; the texts may still part there
        ids = _tokens(chat.answer, tokenizer, special=False)
    if eos in ids:  # templates may write on behind it
        ids = ids[: _behind_end(ids, eos)]
    return [*_without_ends(ids, tokenizer), eos]


def _ends(ids: list[int], eos: int) -> int:
    """How many ends of sequence stand at the end."""
    return next((n for n, token in enumerate(reversed(ids)) if token != eos), len(ids))


def _begun_once(ids: list[int], bos: int | None) -> list[int]:
    """The ids with one beginning of sequence, where the text brought its own beside the tokenizer's or template's."""
    while len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return ids


def _behind_end(ids: list[int], eos: int) -> int:
    """The place behind the last end of sequence."""
    return len(ids) - ids[::-1].index(eos)


def _without_ends(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids without ends of sequence, and white space around them, at their end: an answer ends once, also where its
    text brings an end of its own."""
    eos = tokenizer.eos_token_id
    while eos in ids and not _read(ids[_behind_end(ids, eos) :], tokenizer):
        ids = ids[: _behind_end(ids, eos) - 1]
    return ids


def _assistant_tokens(
    example: Example, tokenizer: PreTrainedTokenizerBase, chat: ChatText | None, prompt: list[int]
) -> list[bool]:
    """Which of the prompt's tokens are earlier turns of the assistant's that are to be learnt, each with its end."""
    if example.history:
        raise DataError(
            f"{origin_of(example)}: the responses in 'history' have no end in the Alpaca form that could be learnt. "
            "Take template chat, write the row as messages, or take loss_on answer."
        )
    turns = [place for place, turn in enumerate(example.messages) if turn.role == "assistant"]
    learnt = [False] * len(prompt)
    if chat is None or not turns:
        return learnt
    eos = tokenizer.eos_token_id
    if all(example.messages[place].learnt for place in turns) and (
        marked := marked_tokens(example, tokenizer)
    ):
        ids, own = marked
        begun = len(ids) - len(_begun_once(ids, tokenizer.bos_token_id))
        ids, own = ids[begun:], own[begun:]
        if _common(ids, prompt) == len(prompt):
            ends = [token == eos and before for token, before in zip(ids, [False, *own], strict=False)]
            return [one or end for one, end in zip(own, ends, strict=True)][: len(prompt)]
    for place in turns:
        if not example.messages[place].learnt:
            continue
        asked, told = earlier_turn(example, place, tokenizer)
        if not chat.prompt.startswith(told):
            raise DataError(
                f"{origin_of(example)}: the chat template writes turn {place} of the conversation otherwise once more "
                "turns follow, so its tokens cannot be told. Take loss_on answer, or a template with generation marks."
            )
        # Where a token spans a border, what the texts have in common ends before it: it belongs to the turn.
        start, end = (
            _common(_begun_once(_tokens(text, tokenizer, special=False), tokenizer.bos_token_id), prompt)
            for text in (asked, told)
        )
        if eos in prompt[start:end]:  # templates may write on behind it
            end = start + _behind_end(prompt[start:end], eos)
        learnt[start:end] = [True] * (end - start)
    return learnt


def _common(first: list[int], second: list[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _cut(
    prompt: list[int], room: int, example: Example, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Where the prompt is cut to have at most `room` tokens: what stands before the first place is kept, its BOS and,
    if cheap, its header, and what stands behind the second, its right end."""
    if len(prompt) <= room:
        return 0, 0
    head = 1 if prompt[0] == tokenizer.bos_token_id and room > 1 else 0
    if example.form == "alpaca":
        header = _tokens(_HEADER, tokenizer, special=False)
        stop = head + len(header)
        if stop <= room // 4 and prompt[head:stop] == header:
            head = stop
    return head, len(prompt) - (room - head)
