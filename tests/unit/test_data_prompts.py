"""Prompts and token ids: the loss counts the answer and its end, and an answer is never cut."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from manylora.data import (
    IGNORED_LABEL,
    Example,
    Message,
    encode,
    encode_prompt,
    options_of,
    prompt_text,
    render_prompt,
)
from manylora.errors import ConfigError, DataError, ModelError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "### Instruction:\nAdd 2 and 3.\n\n### Input:\n\n### Response:\n",
    "the quick brown fox" + " a]]]" * 9,
] * 4
WORDS = Example(task="t", instruction="word " * 200, output="forty two", origin="t.jsonl:7")


def build(
    *, before: str = "<s> ", after: str = "", eos: str | None = "</s>", template: str | None = None
) -> Any:
    """A byte-level BPE tokenizer whose texts are framed as `before` … `after`."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    ids = [(token, inner.token_to_id(token)) for token in special]
    inner.post_processor = processors.TemplateProcessing(single=f"{before}$A{after}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, chat_template=template, model_max_length=64
    )


TOKENIZER = build()
HEADER = TOKENIZER("### Instruction:\n", add_special_tokens=False)["input_ids"]


def chat(*turns: tuple[str, str], output: str = "hello there") -> Example:
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Example(task="t", messages=messages, output=output, form="chat", origin="c.jsonl:3")


# ---------------------------------------------------------------- text


def test_alpaca_prompt_with_and_without_input() -> None:
    bare = Example(task="t", instruction="Add.", output="5")
    full = Example(task="t", instruction="Add.", input="2 3", output="5")
    assert prompt_text(bare) == "### Instruction:\nAdd.\n\n### Response:\n"
    assert prompt_text(full) == "### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n"
    assert render_prompt(full, TOKENIZER) == prompt_text(full)


def test_prompt_form_is_verbatim() -> None:
    example = Example(task="t", instruction="  Q: why?\nA:", output="so", form="prompt")
    assert render_prompt(example, TOKENIZER) == "  Q: why?\nA:"


def test_chat_form_goes_through_the_template() -> None:
    example = chat(("system", "Be brief."), ("user", "hi"))
    tokenizer = build(template=CHATML)
    assert render_prompt(example, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_text(example) == "system: Be brief.\nuser: hi"


# ---------------------------------------------------------------- labels


def test_row_is_prompt_then_answer_then_end_and_loss_counts_the_latter_two() -> None:
    example = Example(task="t", instruction="Add.", output="forty two")
    row = encode(example, TOKENIZER, max_length=256, context_length=256)
    assert TOKENIZER.decode(row.input_ids) == f"<s>{prompt_text(example)}forty two</s>"
    answer = TOKENIZER("forty two", add_special_tokens=False)["input_ids"] + [TOKENIZER.eos_token_id]
    assert row.labels == [IGNORED_LABEL] * row.prompt_length + answer
    assert not row.truncated
    assert row.input_ids[: row.prompt_length] == encode_prompt(example, TOKENIZER, max_length=256)[0]


def test_loss_on_all_counts_every_token() -> None:
    row = encode(WORDS, TOKENIZER, max_length=100, context_length=None, loss_on="all")
    assert row.labels == row.input_ids
    assert row.labels is not row.input_ids


def test_tokenizer_without_bos_and_one_that_ends_every_text() -> None:
    example = Example(task="t", instruction="Add.", output="5")
    for tokenizer in (build(before=""), build(before="", after=" </s>")):
        row = encode(example, tokenizer, max_length=99, context_length=99)
        assert tokenizer.decode(row.input_ids) == f"{prompt_text(example)}5</s>"


# ---------------------------------------------------------------- chat answers


def test_chat_answer_ends_at_the_end_of_turn_where_that_is_the_end_of_sequence() -> None:
    tokenizer = build(template=CHATML, eos="<|im_end|>")
    row = encode(chat(("user", "hi")), tokenizer, max_length=256, context_length=256)
    answer = [label for label in row.labels if label != IGNORED_LABEL]
    assert tokenizer.decode(answer) == "hello there<|im_end|>"
    assert tokenizer.decode(row.input_ids[: row.prompt_length]).endswith("<|im_start|>assistant\n")
    assert row.input_ids.count(tokenizer.bos_token_id) == 0  # the template writes none, so neither do we


def test_chat_answer_keeps_the_end_of_turn_and_gets_the_end_of_sequence() -> None:
    tokenizer = build(template=CHATML, eos="</s>")
    row = encode(chat(("user", "hi")), tokenizer, max_length=256, context_length=256)
    assert tokenizer.decode(row.input_ids[row.prompt_length :]) == "hello there<|im_end|>\n</s>"


def test_chat_answer_where_a_token_spans_prompt_and_answer() -> None:
    template = (
        "{% for m in messages %}{{ '[bot]' if m['role'] == 'assistant' else '[you]' }}{{ m['content'] }}"
        "{{ '[end]' if m['role'] == 'assistant' }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
    )
    tokenizer = build(template=template)
    prompt = tokenizer("[you]x[bot]", add_special_tokens=False)["input_ids"]
    whole = tokenizer("[you]x[bot]]]", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt
    row = encode(chat(("user", "x"), output="]]"), tokenizer, max_length=99, context_length=99)
    assert tokenizer.decode(row.input_ids[: row.prompt_length]) == "[you]x[bot]"
    assert tokenizer.decode(row.input_ids[row.prompt_length :]) == "]][end]</s>"


def test_chat_answer_where_the_template_rewrites_the_conversation() -> None:
    template = "{{ messages | length }} turns {{ messages[-1]['content'] }}"
    row = encode(chat(("user", "hi")), build(template=template), max_length=99, context_length=99)
    assert TOKENIZER.decode(row.input_ids) == "1 turns hihello there</s>"


def test_chat_without_template_names_row_and_remedy() -> None:
    for call in (render_prompt, lambda e, t: encode(e, t, max_length=9, context_length=9)):
        with pytest.raises(
            DataError, match=r"c\.jsonl:3 is a chat row, but .* no chat template\. Take a chat"
        ):
            call(chat(("user", "hi")), TOKENIZER)


def test_template_that_refuses_a_row() -> None:
    refusing = build(template="{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(DataError, match=r"c\.jsonl:3: .* refuses the row \(Roles must alternate\)"):
        encode_prompt(chat(("user", "a"), ("user", "b")), refusing, max_length=9)


# ---------------------------------------------------------------- length


def test_prompt_is_cut_from_the_left_behind_bos_and_header() -> None:
    row = encode(WORDS, TOKENIZER, max_length=100, context_length=2048)
    assert len(row.input_ids) == 100
    assert row.truncated
    text = TOKENIZER.decode(row.input_ids)
    assert text.startswith("<s>### Instruction:\n")
    assert text.endswith("word \n\n### Response:\nforty two</s>")


def test_header_is_kept_only_where_it_takes_a_quarter_at_most() -> None:
    length = 4 * (1 + len(HEADER))
    with_header, _ = encode_prompt(WORDS, TOKENIZER, max_length=length)
    without, _ = encode_prompt(WORDS, TOKENIZER, max_length=length - 1)
    assert with_header[1 : 1 + len(HEADER)] == HEADER
    assert TOKENIZER.decode(without).count("Instruction") == 0
    assert without[0] == TOKENIZER.bos_token_id


def test_prompt_keeps_32_tokens_when_the_answer_is_long() -> None:
    example = Example(task="t", instruction="word " * 200, output="é" * 100)
    row = encode(example, TOKENIZER, max_length=100, context_length=2048)
    assert row.prompt_length == 32
    assert len(row.input_ids) > 100


def test_short_prompt_needs_only_its_own_room() -> None:
    example = Example(task="t", instruction="Hi", output="é" * 20, form="prompt")
    answer = len(TOKENIZER(example.output, add_special_tokens=False)["input_ids"]) + 1
    length = len(TOKENIZER("Hi")["input_ids"])
    row = encode(example, TOKENIZER, max_length=1, context_length=answer + length)
    assert (row.truncated, row.prompt_length) == (False, length)


def test_answer_beyond_the_context_names_row_lengths_and_remedy() -> None:
    example = Example(task="t", instruction="word " * 50, output="é" * 40, origin="t.jsonl:7")
    answer = len(TOKENIZER(example.output, add_special_tokens=False)["input_ids"]) + 1
    with pytest.raises(DataError) as caught:
        encode(example, TOKENIZER, max_length=64, context_length=answer + 31)
    assert f"t.jsonl:7: the answer's {answer} tokens and 32 of the prompt" in str(caught.value)
    assert f"context of {answer + 31}. Shorten the answer" in str(caught.value)
    assert encode(example, TOKENIZER, max_length=64, context_length=answer + 32).prompt_length == 32


def test_row_without_answer_and_tokenizer_without_end() -> None:
    with pytest.raises(DataError, match="A row of task 't' has no answer to train on"):
        encode(Example(task="t", instruction="a"), TOKENIZER, max_length=9, context_length=9)
    with pytest.raises(ModelError, match=r"no end-of-sequence token.*Set tokenizer\.eos_token"):
        encode(WORDS, build(eos=None), max_length=9, context_length=None)


def test_impossible_settings() -> None:
    with pytest.raises(ConfigError, match="max_length 0"):
        encode_prompt(WORDS, TOKENIZER, max_length=0)
    with pytest.raises(ConfigError, match=r"loss_on 'prompt' is unknown\. Choose answer, assistant or all"):
        encode(WORDS, TOKENIZER, max_length=9, context_length=9, loss_on="prompt")  # type: ignore[arg-type]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
examples = st.builds(
    Example,
    task=st.just("t"),
    instruction=texts,
    input=st.one_of(st.just(""), texts),
    output=texts.filter(lambda text: bool(text.strip())),
    form=st.sampled_from(["alpaca", "prompt"]),
    origin=st.just("x:1"),
)


@settings(deadline=None, max_examples=150)
@given(example=examples, max_length=st.integers(1, 200), context=st.one_of(st.none(), st.integers(1, 250)))
def test_answer_is_whole_and_lengths_hold(example: Example, max_length: int, context: int | None) -> None:
    prompt = TOKENIZER(prompt_text(example))["input_ids"]
    answer = [*TOKENIZER(example.output, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    least = min(len(prompt), 32)
    if context is not None and len(answer) + least > context:
        with pytest.raises(DataError, match="x:1: the answer's"):
            encode(example, TOKENIZER, max_length=max_length, context_length=context)
        return
    row = encode(example, TOKENIZER, max_length=max_length, context_length=context)
    n = row.prompt_length
    assert row.input_ids[n:] == answer == row.labels[n:]
    assert row.labels[:n] == [IGNORED_LABEL] * n
    assert row.truncated == (n < len(prompt))
    assert n == min(len(prompt), max(max_length - len(answer), least), (context or 10**9) - len(answer))
    cheap = example.form == "alpaca" and prompt[1 : 1 + len(HEADER)] == HEADER
    head = 1 + len(HEADER) if cheap and 1 + len(HEADER) <= n // 4 else 1
    assert row.input_ids[:n] == prompt[:head] + prompt[len(prompt) - (n - head) :]


@settings(deadline=None, max_examples=80)
@given(example=examples, max_length=st.integers(1, 120))
def test_generation_prompt_keeps_its_end(example: Example, max_length: int) -> None:
    prompt = TOKENIZER(prompt_text(example))["input_ids"]
    ids, truncated = encode_prompt(example, TOKENIZER, max_length=max_length)
    assert len(ids) == min(len(prompt), max_length)
    assert truncated == (len(prompt) > max_length)
    assert ids[-1] == prompt[-1] or len(ids) == 1


@pytest.mark.parametrize(
    "line", ["- " + " " * 200_000, "- a" + " " * 200_000 + "\u00a0", "- " + "a " * 100_000]
)
def test_a_long_option_is_read_in_a_moment(line: str) -> None:
    began = time.perf_counter()
    options_of(f"OPTIONS:\n{line}\n- b")
    assert time.perf_counter() - began < 2  # of one that grows with the square: minutes


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("- a b ", "a b"),
        ("\t-  a", "a"),
        ("-\ta\t", "a"),
        ("- -a", "-a"),
        ("-a", None),
        ("-  ", None),
        ("- \x0ca", "\x0ca"),
    ],
)
def test_an_option_is_what_stands_between_the_blanks(line: str, option: str | None) -> None:
    assert options_of(f"OPTIONS:\n{line}\n") == ([] if option is None else [option])
