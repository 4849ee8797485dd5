"""Generation: greedy, the same at every batch size, and without a trace on model and tokenizer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from manylora.adapters import ManyLoraConfig
from manylora.data import Example, Message
from manylora.errors import ConfigError, DataError, RoutingError
from manylora.evaluation import generate_answers, stop_token_ids, stream_answer

VOCAB = 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **IDS, num_key_value_heads=2, max_position_embeddings=64),
    "qwen2": Qwen2Config(**SIZES, **IDS, num_key_value_heads=2, max_position_embeddings=64),
    "mistral": MistralConfig(
        **SIZES, **IDS, num_key_value_heads=2, max_position_embeddings=64, sliding_window=6
    ),
    "gemma": GemmaConfig(**SIZES, **IDS, num_key_value_heads=2, max_position_embeddings=64, head_dim=8),
    "phi": PhiConfig(**SIZES, **IDS, max_position_embeddings=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
    "gpt-neox": GPTNeoXConfig(**SIZES, **IDS, max_position_embeddings=64),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def words(**special: str) -> Any:
    """A tokenizer of the words w0 … w63, one token each."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def random_model(family: str, seed: int = 0) -> Any:
    """A model whose weights are large enough that its answers differ from prompt to prompt."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.35)
    return model.eval()


def ask(*lengths: int) -> list[Example]:
    """Prompts of the given numbers of tokens, each a different one."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [
        Example(
            task="t",
            form="prompt",
            instruction=" ".join(f"w{i}" for i in torch.randint(VOCAB, (n,), generator=generator).tolist()),
            origin=f"t.jsonl:{row}",
        )
        for row, n in enumerate(lengths, start=1)
    ]


EXAMPLES = ask(5, 1, 12, 7, 7, 20, 3, 2, 9, 16)


def naive(model: Any, tokenizer: Any, example: Example, steps: int, stops: tuple[int, ...] = ()) -> str:
    """Greedy decoding in its plainest form: one row, no padding, no cache, the whole text at every step."""
    ids = tokenizer(example.instruction)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(steps):
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
    return str(tokenizer.decode(ids[start:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_naive_decoding_at_every_batch_size(family: str) -> None:
    model, tokenizer = random_model(family), words()
    expected = [naive(model, tokenizer, example, 6) for example in EXAMPLES]
    assert len(set(expected)) > len(EXAMPLES) // 2  # the model does listen to its prompt
    for batch_size in (1, 3, 16):
        answers = generate_answers(model, tokenizer, EXAMPLES, max_new_tokens=6, batch_size=batch_size)
        assert answers == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_answer_is_the_generated_one(family: str) -> None:
    model, tokenizer = random_model(family), words()
    for example in EXAMPLES[4:6]:
        pieces = list(stream_answer(model, tokenizer, example, max_new_tokens=6))
        assert len(pieces) == 6
        assert "".join(pieces) == naive(model, tokenizer, example, 6)


def reciter(text: str, *, eos: int | None = None) -> tuple[Any, Any]:
    """A GPT-2 that recites a text by position alone, and a tokenizer whose tokens are bytes.

    Its blocks add nothing; the position embeddings are orthogonal and the output layer maps position t to
    byte t + 1 of the text. So every answer is known, and one wrong position id is one wrong letter.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "</s>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    script = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    config = GPT2Config(
        n_embd=128, n_layer=1, n_head=1, n_positions=128, vocab_size=257, tie_word_embeddings=False
    )
    config.bos_token_id = config.eos_token_id = None
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wpe.weight.copy_(torch.eye(128))
        for position, token in enumerate(script[1:]):
            model.lm_head.weight[token, position] = 1.0
    model.generation_config.eos_token_id = eos
    return model, tokenizer


def prompts_of(*texts: str) -> list[Example]:
    return [Example(task="t", form="prompt", instruction=text) for text in texts]


def test_absolute_positions_are_counted_from_the_prompt_not_from_its_padding() -> None:
    text = "every prompt continues where it ends"
    model, tokenizer = reciter(text)
    starts = prompts_of(text[:3], text[:20], text[:9], text[:35])
    answers = generate_answers(model, tokenizer, starts, max_new_tokens=64, batch_size=4)
    assert answers == [text[3:].strip(), text[20:].strip(), text[9:].strip(), text[35:].strip()]


def test_an_answer_ends_at_the_end_token_though_its_batch_goes_on() -> None:
    model, tokenizer = reciter("abcdefgh")
    examples = prompts_of("abcdefg", "a")
    assert generate_answers(model, tokenizer, examples, max_new_tokens=50) == ["h", "bcdefgh"]


def test_the_models_own_end_tokens_count_beside_the_tokenizers() -> None:
    model, tokenizer = reciter("ab|cd|ef")
    bar = tokenizer("|")["input_ids"][0]
    model.generation_config.eos_token_id = [bar, tokenizer.eos_token_id]
    assert stop_token_ids(model, tokenizer) == [tokenizer.eos_token_id, bar]
    examples = prompts_of("a", "ab|c", "ab|cd|")
    assert generate_answers(model, tokenizer, examples, max_new_tokens=9) == ["b", "d", "ef"]
    assert "".join(stream_answer(model, tokenizer, examples[1], max_new_tokens=9)) == "d"


def test_without_any_end_token_an_answer_runs_to_its_limit() -> None:
    model, tokenizer = random_model("llama"), words()
    assert stop_token_ids(model, tokenizer) == []
    answers = generate_answers(model, tokenizer, EXAMPLES[:3], max_new_tokens=5)
    assert [len(answer.split()) for answer in answers] == [5, 5, 5]


def test_each_example_may_have_its_own_limit() -> None:
    model, tokenizer = random_model("gpt2"), words()
    limits = [1, 9, 4, 2, 6]
    expected = [
        naive(model, tokenizer, example, limit) for example, limit in zip(EXAMPLES, limits, strict=False)
    ]
    for batch_size in (1, 2, 5):
        assert (
            generate_answers(model, tokenizer, EXAMPLES[:5], max_new_tokens=limits, batch_size=batch_size)
            == expected
        )


def test_characters_of_several_bytes_are_streamed_whole() -> None:
    text = "xé→😀 z  end "
    model, tokenizer = reciter(text)
    pieces = list(stream_answer(model, tokenizer, prompts_of("x")[0], max_new_tokens=60))
    assert pieces == ["é", "→", "😀", " z", "  e", "n", "d"]
    assert generate_answers(model, tokenizer, prompts_of("x"), max_new_tokens=60) == ["é→😀 z  end"]


def test_half_a_character_at_the_limit_is_kept_alike_by_both() -> None:
    model, tokenizer = reciter("xyé")
    (whole,) = generate_answers(model, tokenizer, prompts_of("x"), max_new_tokens=2)
    assert whole == "y\ufffd"
    assert "".join(stream_answer(model, tokenizer, prompts_of("x")[0], max_new_tokens=2)) == whole


def test_special_tokens_and_outer_blanks_are_no_part_of_an_answer() -> None:
    model, tokenizer = random_model("llama"), words()
    plain = generate_answers(model, tokenizer, EXAMPLES[:1], max_new_tokens=8)[0].split()
    with_special = words(additional_special_tokens=[plain[2]])
    expected = " ".join(word for word in plain if word != plain[2])
    assert generate_answers(model, with_special, EXAMPLES[:1], max_new_tokens=8) == [expected]


def test_progress_counts_examples_batch_by_batch() -> None:
    calls: list[tuple[int, int]] = []
    generate_answers(
        random_model("llama"),
        words(),
        EXAMPLES[:7],
        max_new_tokens=2,
        batch_size=3,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_no_examples_give_no_answers() -> None:
    assert generate_answers(random_model("llama"), words(), [], max_new_tokens=2) == []


def test_decoding_is_greedy_whatever_the_model_asks_for_and_nothing_is_left_behind(
    transformers_log: list[str],
) -> None:
    model, tokenizer = random_model("llama"), words(pad_token="<pad>")  # beyond the embedding
    tokenizer.padding_side = "right"
    expected = [naive(model, tokenizer, example, 6) for example in EXAMPLES]
    for name, value in {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 3,
        "top_p": 0.5,
        "num_beams": 4,
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "min_length": 50,
        "max_length": 3,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
    }.items():
        setattr(model.generation_config, name, value)
    model.train()
    model.model.layers[0].mlp.eval()
    training = {name: module.training for name, module in model.named_modules()}
    config = model.generation_config.to_dict()

    assert generate_answers(model, tokenizer, EXAMPLES, max_new_tokens=6, batch_size=4) == expected
    stream = stream_answer(model, tokenizer, EXAMPLES[0], max_new_tokens=6)
    next(stream)
    assert {name: module.training for name, module in model.named_modules()} == training  # also in between
    stream.close()

    assert {name: module.training for name, module in model.named_modules()} == training
    assert model.generation_config.to_dict() == config
    assert tokenizer.padding_side == "right"
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert transformers_log == []


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    """What transformers says to its log at level WARNING and above."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Keep(logging.WARNING)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_modes_are_restored_after_an_error_too() -> None:
    model = random_model("llama").train()
    with pytest.raises(RuntimeError, match="stop here"):
        generate_answers(model, words(), EXAMPLES[:2], max_new_tokens=2, on_progress=_raise)
    assert all(module.training for module in model.modules())


def _raise(done: int, total: int) -> None:
    raise RuntimeError("stop here")


def test_training_goes_on_after_generation() -> None:
    model, tokenizer = random_model("llama"), words()
    generate_answers(model, tokenizer, EXAMPLES[:3], max_new_tokens=3)
    list(stream_answer(model, tokenizer, EXAMPLES[0], max_new_tokens=3))
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def routed(num_experts: int = 2) -> Any:
    """A Llama with one expert per task, whose experts say different things."""
    config = ManyLoraConfig(
        r=4, num_experts=num_experts, share="none", router="task", target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(random_model("llama"), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_every_example_keeps_its_expert_through_sorting_and_batching() -> None:
    model, tokenizer = routed(), words()
    experts = [i % 2 for i in range(len(EXAMPLES))]
    alone = [
        generate_answers(model, tokenizer, [example], max_new_tokens=6, expert_ids=[expert])[0]
        for example, expert in zip(EXAMPLES, experts, strict=True)
    ]
    swapped = generate_answers(
        model, tokenizer, EXAMPLES, max_new_tokens=6, expert_ids=[1 - expert for expert in experts]
    )
    assert sum(map(str.__ne__, alone, swapped)) > len(EXAMPLES) // 2
    for batch_size in (3, 16):
        together = generate_answers(
            model, tokenizer, EXAMPLES, max_new_tokens=6, batch_size=batch_size, expert_ids=experts
        )
        assert together == alone
    streamed = stream_answer(model, tokenizer, EXAMPLES[3], max_new_tokens=6, expert_id=experts[3])
    assert "".join(streamed) == alone[3]


def test_routing_errors_surface() -> None:
    model, tokenizer = routed(), words()
    with pytest.raises(RoutingError, match="3 expert ids for 2 examples"):
        generate_answers(model, tokenizer, EXAMPLES[:2], max_new_tokens=2, expert_ids=[0, 1, 0])
    with pytest.raises(RoutingError):
        generate_answers(model, tokenizer, EXAMPLES[:2], max_new_tokens=2, expert_ids=[0, 7])
    with pytest.raises(RoutingError):
        list(stream_answer(model, tokenizer, EXAMPLES[0], max_new_tokens=2, expert_id=7))
    with pytest.raises(RoutingError):
        generate_answers(model, tokenizer, EXAMPLES[:2], max_new_tokens=2)


def test_a_long_prompt_keeps_its_end() -> None:
    model, tokenizer = random_model("llama"), words()
    (long,) = ask(30)
    short = Example(task="t", form="prompt", instruction=" ".join(long.instruction.split()[-10:]))
    assert generate_answers(model, tokenizer, [long], max_new_tokens=5, max_length=10) == (
        generate_answers(model, tokenizer, [short], max_new_tokens=5)
    )


def test_prompt_and_answer_fit_the_context_together() -> None:
    model, tokenizer = random_model("gpt2"), words()  # 64 positions
    examples = ask(60, 64, 80)
    answers = generate_answers(model, tokenizer, examples, max_new_tokens=4)
    fitting = [
        Example(task="t", form="prompt", instruction=" ".join(row.instruction.split()[-60:]))
        for row in examples
    ]
    assert answers == generate_answers(model, tokenizer, fitting, max_new_tokens=4)
    with pytest.raises(ConfigError, match=r"64 leaves no room .* context of 64"):
        generate_answers(model, tokenizer, examples, max_new_tokens=64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens 0"),
        ({"max_new_tokens": [1]}, ConfigError, "1 values of max_new_tokens for 2"),
        ({"max_new_tokens": 2, "batch_size": 0}, ConfigError, "batch_size 0"),
        ({"max_new_tokens": 2, "max_length": 0}, ConfigError, "max_length 0"),
    ],
)
def test_impossible_settings_are_errors(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate_answers(random_model("llama"), words(), EXAMPLES[:2], **options)


def test_an_empty_prompt_is_an_error_that_names_its_row() -> None:
    empty = Example(task="t", form="prompt", instruction="", origin="t.jsonl:3")
    with pytest.raises(DataError, match=r"t\.jsonl:3 has an empty prompt"):
        generate_answers(random_model("llama"), words(), [empty], max_new_tokens=2)
    with pytest.raises(DataError, match="empty prompt"):  # when called, not when first read
        stream_answer(random_model("llama"), words(), empty, max_new_tokens=2)


def test_without_a_limit_a_prompt_is_read_up_to_the_context_and_a_cut_is_told() -> None:
    model, tokenizer = random_model("llama"), words()  # 64 positions
    told: list[Any] = []
    examples = ask(60, 64, 5)
    answers = generate_answers(model, tokenizer, examples, max_new_tokens=4, on_cut=told.append)
    assert told == [[1]]  # once, with the places of the prompts that were cut
    assert answers[0] == naive(model, tokenizer, examples[0], 4)
    assert (
        "".join(stream_answer(model, tokenizer, examples[1], max_new_tokens=4, on_cut=told.append))
        == answers[1]
    )
    assert told == [[1], 60]  # the tokens that are left
    list(stream_answer(model, tokenizer, examples[2], max_new_tokens=4, on_cut=told.append))
    generate_answers(model, tokenizer, examples[2:], max_new_tokens=4, on_cut=told.append)
    assert len(told) == 2


@pytest.mark.parametrize("closed", [1, 2, 3])
def test_what_the_template_writes_after_an_answer_is_no_part_of_it(closed: int) -> None:
    model, tokenizer = random_model("llama"), words()
    messages = (Message(role="user", content=EXAMPLES[0].instruction),)
    example = Example(task="t", form="chat", messages=messages, origin="c.jsonl:1")
    whole = naive(model, tokenizer, EXAMPLES[0], 6).split()
    closing = " ".join(whole[-closed:])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ ' "
        + closing
        + "' }}{% endif %}"
        "{% if not loop.last %} {% endif %}{% endfor %}"
    )
    (answer,) = generate_answers(model, tokenizer, [example], max_new_tokens=6)
    assert answer == " ".join(whole[:-closed])
    assert "".join(stream_answer(model, tokenizer, example, max_new_tokens=6)) == answer


def test_a_token_that_the_model_has_no_row_for_is_named() -> None:
    tokenizer = words()
    tokenizer.add_tokens(["extra"])
    example = Example(task="t", form="prompt", instruction="w1 extra", origin="t.jsonl:3")
    with pytest.raises(
        DataError, match=rf"t\.jsonl:3 gives the token 'extra' \(id {VOCAB}\), but the model has rows"
    ):
        generate_answers(random_model("llama"), tokenizer, [example], max_new_tokens=2)
