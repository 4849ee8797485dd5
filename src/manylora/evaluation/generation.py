"""Answers from a model: greedy generation in batches for evaluation, one answer as a stream for `predict`.

Greedy means the token of the highest logit at every step, also where the model's own generation config asks
for sampling, beams or penalties, until an end token or the limit. The prompts of a batch are padded on the
left, and padding is neither attended to nor counted as a position; so an answer is the same at every batch
size, up to ties within the rounding of the model's dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from manylora.data import Example, closing_text, encode_prompt, without_closing
from manylora.errors import ConfigError, DataError, RoutingError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    Model: TypeAlias = PreTrainedModel | PeftModel

# torch and transformers are imported by the functions that need them: what only scores loads without them.

BATCH_SIZE = 64
"""Prompts per batch. 1,600 prompts of about 60 tokens, 10-token answers, 4.3 M parameters, one CPU core: 29, 25,
22 and 20 CPU seconds at 8, 32, 64 and 128."""
NO_LIMIT = 2**31
"""Tokens of a prompt where neither the run nor the model has a limit."""


def generate_answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    expert_ids: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_cut: Callable[[Sequence[int]], None] | None = None,
) -> list[str]:
    """The model's greedy answers, one per example and in their order.

    Rows of like length share a batch, the longest first. Model and tokenizer are left as they were.

    Args:
        model: any causal language model, with an adapter or without.
        tokenizer: the model's; its padding side does not matter.
        examples: the prompts to answer.
        max_new_tokens: limit of an answer in tokens, for all or for each example.
        batch_size: prompts generated together.
        max_length: tokens that a prompt may have; a longer one is cut (see `manylora.data.encode_prompt`).
            Default: what the model's context leaves beside the answer, to which any prompt is cut.
        expert_ids: for a task router, the expert of each example.
        on_progress: called with (examples done, examples in all) after every batch.
        on_cut: called, before anything is generated, with the positions of the examples whose prompts are cut, if any.

    Returns:
        Answers without special tokens, what the chat template writes after one, and outer white space.

    Raises:
        ConfigError: a limit or the batch size is below 1, or the answer alone fills the model's context.
        DataError: a prompt has no token.
        RoutingError: `expert_ids` has another length than `examples`, or see the adapter.
        NonFiniteError: the model's output is NaN, of which greedy decoding would make some token.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} must be 1 or more.")
    if expert_ids is not None and len(expert_ids) != len(examples):
        raise RoutingError(
            f"There are {len(expert_ids)} expert ids for {len(examples)} examples. Give one each."
        )
    limits = _limits(max_new_tokens, len(examples))
    read = [
        _prompt(model, tokenizer, example, limit, max_length)
        for example, limit in zip(examples, limits, strict=True)
    ]
    prompts = [ids for ids, _ in read]
    if on_cut is not None and (cut := [place for place, (_, truncated) in enumerate(read) if truncated]):
        on_cut(cut)
    order = sorted(range(len(examples)), key=lambda i: (limits[i], len(prompts[i])), reverse=True)
    answers = [""] * len(examples)
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            generated = _generate_batch(
                model,
                tokenizer,
                [prompts[i] for i in batch],
                max_new_tokens=max(limits[i] for i in batch),
                expert_ids=None if expert_ids is None else [expert_ids[i] for i in batch],
                origins=[_origin(examples[i]) for i in batch],
            )
            for i, ids in zip(batch, generated, strict=True):
                closing = closing_text(examples[i], tokenizer)
                answers[i] = without_closing(_text(tokenizer, ids[: limits[i]]).strip(), closing)
            if on_progress is not None:
                on_progress(min(start + batch_size, len(order)), len(order))
    return answers


def stream_answer(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    max_new_tokens: int,
    max_length: int | None = None,
    expert_id: int | None = None,
    on_cut: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """The greedy answer to one example, piece by piece as it is generated.

    The pieces add up to what `generate_answers` returns. There is no thread: a token is computed when the
    next piece is asked for, so leaving the loop ends the work, an error arises where the pieces are read, and
    between pieces the model is as it was.

    Args:
        model, tokenizer, max_new_tokens, max_length: as for `generate_answers`.
        example: the prompt to answer.
        expert_id: for a task router, the expert to use.
        on_cut: called with the tokens that are left of the prompt, where it is cut.

    Raises:
        ConfigError, DataError, RoutingError, NonFiniteError: as `generate_answers`.
    """
    (limit,) = _limits(max_new_tokens, 1)
    prompt, cut = _prompt(model, tokenizer, example, limit, max_length)
    if cut and on_cut is not None:
        on_cut(len(prompt))
    closing = closing_text(example, tokenizer)
    return _stream(model, tokenizer, prompt, limit, expert_id, closing=closing, origin=_origin(example))


def _limits(max_new_tokens: int | Sequence[int], n: int) -> list[int]:
    limits = [max_new_tokens] * n if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != n:
        raise ConfigError(
            f"There are {len(limits)} values of max_new_tokens for {n} examples. Give one each."
        )
    if limits and min(limits) < 1:
        raise ConfigError(f"max_new_tokens {min(limits)} must be 1 or more.")
    return limits


def context_of(config: PretrainedConfig) -> int | None:
    """Tokens that a model reads, of its text part where it has several; None where nothing says."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _prompt(
    model: Model, tokenizer: PreTrainedTokenizerBase, example: Example, limit: int, max_length: int | None
) -> tuple[list[int], bool]:
    """Prompt ids that leave room for `limit` tokens in the model's context, and whether they were cut."""
    context = context_of(model.config)
    max_length = NO_LIMIT if max_length is None else max_length
    if context is not None:
        if limit >= context:
            raise ConfigError(
                f"max_new_tokens {limit} leaves no room for a prompt in the model's context of {context} "
                f"tokens. Take fewer than {context}."
            )
        max_length = min(max_length, context - limit)
    rows = model.get_input_embeddings().weight.shape[0]
    ids, truncated = encode_prompt(example, tokenizer, max_length=max_length, vocabulary=rows)
    if not ids:
        raise DataError(
            f"{example.origin or f'A row of task {example.task!r}'} has an empty prompt. Give it some text."
        )
    return ids, truncated


def _origin(example: Example) -> str:
    return example.origin or f"a row of task {example.task!r}"


def _generate_batch(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    expert_ids: Sequence[int] | None,
    origins: Sequence[str],
) -> list[list[int]]:
    """New token ids of every prompt, without the end token."""
    import torch
    from transformers import LogitsProcessorList

    from manylora.evaluation.finite import refuse_output

    longest = max(map(len, prompts))
    stops = stop_token_ids(model, tokenizer)
    config = _greedy(model, tokenizer, max_new_tokens, stops)
    fill = config.pad_token_id
    rows = [[fill] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    routing: dict[str, Any] = {}
    if expert_ids is not None:
        routing["expert_ids"] = torch.tensor(list(expert_ids), dtype=torch.long, device=model.device)
    watch = _NanWatch()
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(rows, dtype=torch.long, device=model.device),
            attention_mask=torch.tensor(mask, dtype=torch.long, device=model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([watch]),
            **routing,
        )
    if bad := watch.rows():
        refuse_output(model, [origins[row] for row in bad])
    return [_until_stop(ids, stops) for ids in output[:, longest:].tolist()]


class _NanWatch:
    """Looks at the logits of every step, (rows, V), and changes nothing; read once, so that no step waits for it."""

    def __init__(self) -> None:
        self._bad: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bad = scores.isnan().any(-1)
        self._bad = bad if self._bad is None else self._bad | bad
        return scores

    def rows(self) -> list[int]:
        """Those of the batch for which a step was not a number."""
        return [] if self._bad is None else self._bad.nonzero()[:, 0].tolist()


def _greedy(
    model: Model, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, stops: Sequence[int]
) -> GenerationConfig:
    """Plain greedy decoding; defaults are spelt out because the model's own config fills what is not."""
    from transformers import GenerationConfig

    # What fills up rows must be a token that the model can embed; it is never attended to.
    known = model.get_input_embeddings().num_embeddings
    fillers = [tokenizer.pad_token_id, *stops]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_length=0,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        early_stopping=False,
        use_cache=True,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        typical_p=1.0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        return_dict_in_generate=False,
        output_scores=False,
        eos_token_id=list(stops) or None,
        pad_token_id=next((i for i in fillers if i is not None and i < known), 0),
    )


def stop_token_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's end token, then those of the model's generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
    return list(dict.fromkeys(int(i) for i in ids if i is not None))


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((position for position, i in enumerate(ids) if i in stops), len(ids))
    return ids[:end]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, every module's own mode again outside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _stream(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    limit: int,
    expert_id: int | None,
    *,
    closing: str,
    origin: str,
) -> Iterator[str]:
    import torch

    from manylora.evaluation.finite import refuse_output

    stops = stop_token_ids(model, tokenizer)
    routing: dict[str, Any] = {}
    if expert_id is not None:
        routing["expert_ids"] = torch.tensor([expert_id], dtype=torch.long, device=model.device)
    ids: list[int] = []
    shown = ""
    past: Any = None
    for _ in range(limit):
        # Without a cache to go on from, as in models that keep none, the whole text is read again.
        unread = [*prompt, *ids] if past is None else ids[-1:]
        with _evaluating(model), torch.inference_mode():
            output = model(
                input_ids=torch.tensor([unread], dtype=torch.long, device=model.device),
                past_key_values=past,
                use_cache=True,
                **routing,
            )
            logits_V = output.logits[0, -1]
            token = int(logits_V.argmax())  # of NaN, where there is one
            if logits_V[token].isnan():
                refuse_output(model, [origin])
            past = getattr(output, "past_key_values", None)
        if token in stops:
            break
        ids.append(token)
        # What stands at the end may turn out to be no part of the answer (white space, the beginning of what the
        # template writes after one), and half a character reads "�".
        text = _text(tokenizer, ids).lstrip()
        ready = _settled(text.rstrip(), closing)
        if not text.endswith("�") and ready.startswith(shown) and len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    rest = without_closing(_text(tokenizer, ids).strip(), closing)
    if len(rest) > len(shown):
        yield rest[len(shown) :]


def _settled(text: str, closing: str) -> str:
    """The text without an end that may be the beginning of `closing`."""
    begun = next((n for n in range(len(closing), 0, -1) if text.endswith(closing[:n])), 0)
    return text[: len(text) - begun].rstrip() if begun else text
